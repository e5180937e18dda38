"""Sequence classifiers over HTTP, their one head read three ways, against transformers' pipelines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.equality.matrix import TOGETHER, TOLERANCE, Models, ask, assert_same, attentions, configs, refusal, texts_of
from tests.inprocess import served
from tests.tasks.families import FAMILIES, LIMIT, TEXTS, family

CLASSES = ("bad", "fair", "good", "best")
NLI = ("contradiction", "neutral", "entailment")
PAIRS = [
    ("small words", "one vector"),
    ("", "a"),
    ("the " * 60, "the model"),
    ("a", "the " * 60),
    ("e\u0301\x00", "☕\r\n"),
]


def sequence_classifiers() -> Models:
    kinds = {"classes": CLASSES, "nli": NLI, "rerank": ("LABEL_0",)}
    return {
        f"{name}-{kind}": family(name, "AutoModelForSequenceClassification", labels=labels)
        for name in FAMILIES
        for kind, labels in kinds.items()
    } | {
        problem: family("bert", "AutoModelForSequenceClassification", labels=("a", "b", "c"), problem_type=problem)
        for problem in ("regression", "multi_label_classification", "single_label_classification")
    }


@pytest.fixture(scope="module")
def models() -> Models:
    return sequence_classifiers()


@pytest.fixture(scope="module")
def url(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(configs(models), tmp_path_factory.mktemp("cache"), **TOGETHER) as base:
        yield f"{base}/models"


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_the_pipelines(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-classes"]
    texts = texts_of(given)
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT)
    options = [
        {},
        {"top_k": 2},
        {"top_k": 1},
        {"function_to_apply": "sigmoid"},
        {"function_to_apply": "softmax"},
        {"function_to_apply": "none", "top_k": 3},
    ]
    answers = ask(f"{url}/{name}-classes", [{"inputs": texts, "parameters": chosen} for chosen in options])
    for got, chosen in zip(answers, options, strict=True):
        assert_same(got, pipe(texts, **{"top_k": None, **chosen}))


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_that_come_at_once_are_each_answered_as_alone(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-classes"]
    texts = texts_of(given)
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT)
    got = ask(f"{url}/{name}-classes", [{"inputs": text} for text in texts])
    assert_same(got, [[scores] for scores in pipe(texts, top_k=None)])


def test_every_model_is_computed_packed(url: str) -> None:
    assert attentions(url) == {"packed"}


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_the_function_is_what_the_models_config_asks_for(problem: str, url: str, models: Models) -> None:
    texts = list(TEXTS.values())
    [got] = ask(f"{url}/{problem}", [{"inputs": texts}])
    assert_same(got, models[problem].pipe("text-classification", truncation=True, max_length=LIMIT)(texts, top_k=None))


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_pairs_are_the_pipelines(name: str, url: str, models: Models) -> None:
    pipe = models[f"{name}-classes"].pipe("text-classification", truncation=True, max_length=LIMIT)
    pairs = [{"text": first, "text_pair": second} for first, second in PAIRS]
    wanted = pipe(pairs, top_k=None)
    for got in ask(f"{url}/{name}-classes", [{"inputs": pairs}, {"inputs": [list(pair) for pair in PAIRS]}]):
        assert_same(got, wanted)


@pytest.mark.parametrize("kind", ["classes", "nli", "rerank"])
def test_a_wrong_token_type_moves_every_pairs_answer_far_beyond_the_tolerance(kind: str, models: Models) -> None:
    given = models[f"bert-{kind}"]
    function = torch.nn.Sigmoid() if kind == "rerank" else torch.nn.Softmax(-1)
    for pair in PAIRS:
        right = given.tokenizer(*([text] for text in pair), truncation=True, max_length=LIMIT, return_tensors="pt")
        wrong = {**right, "token_type_ids": torch.zeros_like(right["token_type_ids"])}
        with torch.inference_mode():
            scores, others = (function(given.model(**inputs).logits) for inputs in (right, wrong))
        assert float((scores - others).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_shot_labels_are_the_pipelines(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-nli"]
    texts = texts_of(given, empty=False)
    pipe = given.pipe("zero-shot-classification")
    options = [
        {"candidate_labels": ["small", "words", "a long line"]},
        {"candidate_labels": ["small", "words", "a long line"], "multi_label": True},
        {"candidate_labels": "one, two", "hypothesis_template": "{} it's"},
        {"candidate_labels": ["one"]},
        {"candidate_labels": ["small", "one", "small"]},
        {"candidate_labels": ["small", "one"], "hypothesis_template": "{0}, or not {0}."},
    ]
    answers = ask(f"{url}/{name}-nli", [{"inputs": texts, "parameters": chosen} for chosen in options])
    for got, chosen in zip(answers, options, strict=True):
        wanted = [zip(each["labels"], each["scores"], strict=True) for each in pipe(texts, **chosen)]
        assert_same(got, [[{"label": label, "score": score} for label, score in each] for each in wanted])


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_the_score_of_the_pair(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-rerank"]
    documents = texts_of(given, empty=False)
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT)
    pairs = [{"text": "small words", "text_pair": text} for text in documents]
    scores = [each["score"] for each in pipe(pairs)]
    logits = [each["score"] for each in pipe(pairs, function_to_apply="none")]
    compared = {"source_sentence": "small words", "sentences": documents}
    here = f"{url}/{name}-rerank"
    assert_same(ask(here, [{"inputs": compared}, {"inputs": compared, "parameters": {"raw_scores": True}}])[0], scores)
    ranked = ask(
        f"{here}/rerank",
        [{"query": "small words", "texts": documents, "raw_scores": raw, "return_text": True} for raw in (False, True)],
    )
    for got, wanted in zip(ranked, (scores, logits), strict=True):
        order = sorted(range(len(wanted)), key=lambda index: -wanted[index])
        best_first = [{"index": i, "text": documents[i], "score": wanted[i]} for i in order]
        assert_same(sorted(got, key=lambda each: each["index"]), sorted(best_first, key=lambda each: each["index"]))
        assert [each["score"] for each in got] == sorted((each["score"] for each in got), reverse=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_side_of_a_pair_is_scored_as_the_model_scores_it(name: str, url: str, models: Models) -> None:
    """As a batch of pairs is tokenized, which keeps the pair where its second text is empty."""
    given, here = models[f"{name}-rerank"], f"{url}/{name}-rerank"
    for query, documents in (("small words", ["a line", "", "the model"]), ("", ["a line", "", "the model"])):
        with torch.inference_mode():
            wanted = [
                float(given.model(**given.tokenizer([[query, text]], return_tensors="pt")).logits[0, 0])
                for text in documents
            ]
        [ranked] = ask(f"{here}/rerank", [{"query": query, "texts": documents, "raw_scores": True}])
        [infer] = ask(
            f"{url.removesuffix('/models')}/v2/models/{name}-rerank/infer",
            [
                {
                    "inputs": [
                        {"name": "query", "shape": [1], "datatype": "BYTES", "data": [query]},
                        {"name": "documents", "shape": [len(documents)], "datatype": "BYTES", "data": documents},
                    ],
                    "parameters": {"raw_scores": True},
                }
            ],
        )
        assert_same([each["score"] for each in sorted(ranked, key=lambda each: each["index"])], wanted)
        assert_same(infer["outputs"][0]["data"], wanted)


def test_what_the_pipeline_refuses_is_refused_with_the_reason(url: str, models: Models) -> None:
    with pytest.raises(ValueError, match="at least one label"):
        models["bert-nli"].pipe("zero-shot-classification")("", ["one"])
    zero_shot = {"candidate_labels": ["one"]}
    status, why = refusal(f"{url}/bert-nli", {"inputs": "", "parameters": zero_shot})
    assert (status, why) == (400, "inputs[0]: is empty; send a text")
    for template in ("no place", "{} and {}", "{0} and {}", "{0.__class__}", "{1}"):
        body = {"inputs": "a", "parameters": {**zero_shot, "hypothesis_template": template}}
        assert "hypothesis_template" in refusal(f"{url}/bert-nli", body)[1]


@pytest.mark.parametrize("name", ["bert-classes", "roberta-nli", "albert-rerank"])
def test_a_text_that_may_not_be_cut_is_refused_with_its_tokens_and_the_limit(
    name: str, url: str, models: Models
) -> None:
    fits, too_long = texts_of(models[name])[-2:]
    parameters = {"truncate": False}
    here = f"{url}/{name}"
    assert len(ask(here, [{"inputs": [fits], "parameters": parameters}])[0]) == 1
    status, why = refusal(here, {"inputs": [fits, too_long], "parameters": parameters})
    assert status == 422
    assert str(LIMIT + 1) in why
    assert str(LIMIT) in why


def test_options_beside_the_inputs_count_as_those_among_the_parameters(url: str, models: Models) -> None:
    given, long = models["bert-classes"], "The model reads small words. " * 40
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT, top_k=None)
    for more in ({}, {"parameters": {}}):
        assert refusal(f"{url}/bert-classes", {"inputs": long, "truncate": False, **more})[0] == 422
        given.tokenizer.truncation_side = "left"
        wanted = pipe([long])
        given.tokenizer.truncation_side = "right"
        assert_same(ask(f"{url}/bert-classes", [{"inputs": [long], "truncation_direction": "left", **more}])[0], wanted)

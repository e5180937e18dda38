"""Every task that transformers has a pipeline for, against that pipeline, over families and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serve_app.errors import EmptyInputError, InvalidInputError
from serve_app.options import (
    ClassificationOptions,
    FillMaskOptions,
    TokenClassificationOptions,
    TokenEmbeddingOptions,
    ZeroShotOptions,
)
from serve_app.types import Request
from tests.tasks.families import EMPTY, FAMILIES, LIMIT, LONG, TEXTS, Family, family, of_length, with_card

NER = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
NLI = ("contradiction", "neutral", "entailment")


def ask(given: Family, task: str, inputs: Any, options: Any, **keys: Any) -> Any:
    return given.answer(Request("1", given.card.name, task, tuple(inputs), options, **keys))


def lengths(given: Family) -> dict[str, str]:
    return {"limit": of_length(given, LIMIT), "limit + 1": of_length(given, LIMIT + 1)}


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_the_pipelines(name: str) -> None:
    given = family(name, "AutoModelForSequenceClassification", labels=("bad", "fair", "good", "best"))
    texts = [*TEXTS.values(), *EMPTY.values(), *LONG.values(), *lengths(given).values()]
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT)
    for options, keys in (
        (ClassificationOptions(), {"top_k": None}),
        (ClassificationOptions(top_k=2), {"top_k": 2}),
        (ClassificationOptions(function="sigmoid"), {"top_k": None, "function_to_apply": "sigmoid"}),
        (ClassificationOptions(function="none"), {"top_k": None, "function_to_apply": "none"}),
    ):
        for got, wanted in zip(ask(given, "text-classification", texts, options), pipe(texts, **keys), strict=True):
            same_labels(got, wanted)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
def test_the_function_is_what_the_models_config_asks_for(problem_type: str) -> None:
    given = family("bert", "AutoModelForSequenceClassification", labels=("a", "b", "c"), problem_type=problem_type)
    assert given.card.problem_type == problem_type
    got = ask(given, "text-classification", ["small words"], ClassificationOptions())
    same_labels(got[0], given.pipe("text-classification")("small words", top_k=None))


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_pairs_are_the_pipelines(name: str) -> None:
    given = family(name, "AutoModelForSequenceClassification", labels=("bad", "fair", "good", "best"))
    pairs = [("small words", "one vector"), ("", "a"), ("the " * 60, "the model"), ("a", "the " * 60)]
    pipe = given.pipe("text-classification", truncation=True, max_length=LIMIT)
    wanted = pipe([{"text": a, "text_pair": b} for a, b in pairs], top_k=None)
    for got, each in zip(ask(given, "text-classification", pairs, ClassificationOptions()), wanted, strict=True):
        same_labels(got, each)


def same_labels(got: Any, wanted: Any) -> None:
    assert [each.label for each in got] == [each["label"] for each in wanted]
    np.testing.assert_allclose([each.score for each in got], [each["score"] for each in wanted], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("template", ["This example is {}.", "{} it's"])
def test_zero_shot_labels_are_the_pipelines(name: str, multi_label: bool, template: str) -> None:
    given = family(name, "AutoModelForSequenceClassification", labels=NLI)
    texts = [*TEXTS.values(), *LONG.values(), *lengths(given).values()]
    pipe = given.pipe("zero-shot-classification")
    for labels in (("one",), ("small", "words", "a long line")):
        options = ZeroShotOptions(labels, multi_label, template)
        got = ask(given, "zero-shot-classification", texts, options)
        wanted = pipe(texts, list(labels), hypothesis_template=template, multi_label=multi_label)
        for each, other in zip(got, wanted, strict=True):
            assert [one.label for one in each] == other["labels"]
            np.testing.assert_allclose([one.score for one in each], other["scores"], atol=1e-5)


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{0.__class__} {}", "{:>1000000000}", "{{}}", "{} {"])
def test_a_template_with_anything_but_one_place_is_refused(template: str) -> None:
    given = family("bert", "AutoModelForSequenceClassification", labels=NLI)
    with pytest.raises(InvalidInputError, match="hypothesis_template"):
        ask(given, "zero-shot-classification", ["a"], ZeroShotOptions(("one",), template=template))


def test_zero_shot_of_nothing_is_refused_as_in_the_pipeline() -> None:
    given = family("bert", "AutoModelForSequenceClassification", labels=NLI)
    for texts, labels in (([""], ("one",)), (["a"], ())):
        with pytest.raises(ValueError, match="at least one label"):
            given.pipe("zero-shot-classification")(texts, list(labels))
        with pytest.raises(EmptyInputError):
            ask(given, "zero-shot-classification", texts, ZeroShotOptions(labels))


def test_a_classifier_without_entailment_answers_no_zero_shot_unless_configured_for_it() -> None:
    given = family("bert", "AutoModelForSequenceClassification", labels=("bad", "fair", "good", "best"))
    with pytest.raises(InvalidInputError, match="no label for entailment"):
        ask(given, "zero-shot-classification", ["a"], ZeroShotOptions(("one",)))
    got = ask(
        with_card(given, task="zero-shot-classification"),
        "zero-shot-classification",
        ["a"],
        ZeroShotOptions(("one", "two")),
    )
    assert [each.label for each in got[0]] == given.pipe("zero-shot-classification")("a", ["one", "two"])["labels"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_entities_are_the_pipelines(name: str, aggregation: Any) -> None:
    given = family(name, "AutoModelForTokenClassification", labels=NER)
    texts = [*TEXTS.values(), *EMPTY.values(), *LONG.values(), *lengths(given).values()]
    for ignored in (("O",), ("B-PER", "LOC"), ()):
        pipe = given.pipe("token-classification", aggregation_strategy=aggregation, ignore_labels=list(ignored))
        got = ask(given, "token-classification", texts, TokenClassificationOptions(aggregation, ignored))
        for each, text in zip(got, texts, strict=True):
            same_entities(each, pipe(text))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("aggregation", ["simple", "first", "average", "max"])
@pytest.mark.parametrize("stride", [0, 7])
def test_entities_over_windows_are_the_pipelines(name: str, aggregation: Any, stride: int) -> None:
    given = family(name, "AutoModelForTokenClassification", labels=NER)
    text = "Hugging Face Inc. was sent to New York, said they. The model reads one of it's words. " * 8
    pipe = given.pipe("token-classification", aggregation_strategy=aggregation, stride=stride)
    options = TokenClassificationOptions(aggregation)
    got = ask(given, "token-classification", [text], options, long_texts="windows", stride=stride)
    wanted = pipe(text)
    assert wanted[-1]["end"] > len(text) // 2
    same_entities(got[0], wanted)


def same_entities(got: Any, wanted: Any) -> None:
    assert [(e.label, e.word, e.start, e.end) for e in got] == [
        (w.get("entity_group", w.get("entity")), w["word"], w["start"], w["end"]) for w in wanted
    ]
    assert [e.index for e in got] == [w.get("index") for w in wanted]
    np.testing.assert_allclose([e.score for e in got], [w["score"] for w in wanted], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_over_windows_are_each_told_once(name: str) -> None:
    given = family(name, "AutoModelForTokenClassification", labels=NER)
    text = "Hugging Face Inc. ☕ was sent to New York, said they. " * 12
    options = TokenClassificationOptions("none", ())
    (got,) = ask(given, "token-classification", [text], options, long_texts="windows", stride=9)
    whole = given.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    own = [i for i, special in enumerate(whole["special_tokens_mask"]) if not special]
    assert [entity.index for entity in got] == own
    assert [(entity.start, entity.end) for entity in got] == [whole["offset_mapping"][i] for i in own]


@pytest.mark.parametrize("name", FAMILIES)
def test_fills_are_the_pipelines(name: str) -> None:
    given = family(name, "AutoModelForMaskedLM", 96)
    mask = given.tokenizer.mask_token
    texts = [f"{text} {mask}" for text in TEXTS.values()]
    texts += [mask, f"the {mask} reads {mask} words.", f"{mask} model (yet) don't, . {mask}{mask}"]
    for options, keys in (
        (FillMaskOptions(), {}),
        (FillMaskOptions(top_k=2), {"top_k": 2}),
        (
            FillMaskOptions(top_k=3, targets=("the", "model", "reads", "the")),
            {"top_k": 3, "targets": ["the", "model", "reads"]},
        ),
        (FillMaskOptions(targets=("unheard-of", "words")), {"targets": ["unheard-of", "words"]}),
    ):
        for got, text in zip(ask(given, "fill-mask", texts, options), texts, strict=True):
            wanted = given.pipe("fill-mask")(text, **keys)
            same_fills(got, wanted if isinstance(wanted[0], list) else [wanted])


def same_fills(got: Any, wanted: Any) -> None:
    assert [[(f.token, f.token_str, f.sequence) for f in mask] for mask in got] == [
        [(f["token"], f["token_str"], f["sequence"]) for f in mask] for mask in wanted
    ]
    for mask, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose([f.score for f in mask], [f["score"] for f in other], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no mask token"),
        ("no mask at all", "no mask token"),
        ("the " * 60 + "{mask}", "its mask token .* was lost"),
    ],
    ids=["empty", "no mask", "cut off"],
)
def test_a_text_without_a_mask_is_refused(text: str, why: str) -> None:
    given = family("bert", "AutoModelForMaskedLM")
    with pytest.raises(InvalidInputError, match=rf"inputs\[1\]: {why}"):
        ask(given, "fill-mask", [given.tokenizer.mask_token, text.replace("{mask}", "[MASK]")], FillMaskOptions())


@pytest.mark.parametrize(
    "options", [FillMaskOptions(), FillMaskOptions(targets=("the",) * 5)], ids=["top_k", "targets"]
)
def test_more_fills_than_anybody_reads_are_refused(options: FillMaskOptions) -> None:
    given = family("bert", "AutoModelForMaskedLM")
    with pytest.raises(InvalidInputError, match=": 5 fills of 4001 masks are more than 20000; ask for fewer"):
        ask(given, "fill-mask", ["[MASK] the [MASK]"] * 2000 + ["[MASK]"], options)
    ids = (given.card.mask_token_id,) * 4001
    with pytest.raises(InvalidInputError, match="4001 masks"):
        ask(given, "fill-mask", [ids], options)


def test_more_targets_than_anybody_has_are_refused() -> None:
    options = FillMaskOptions(targets=("the",) * 1001)
    with pytest.raises(InvalidInputError, match="targets: has 1001, and 1000 are allowed"):
        ask(family("bert", "AutoModelForMaskedLM"), "fill-mask", ["[MASK]"], options)


def test_more_labels_to_ignore_than_a_model_has_are_refused() -> None:
    given = family("bert", "AutoModelForTokenClassification", labels=NER)
    options = TokenClassificationOptions(ignore_labels=("O",) * 1001)
    with pytest.raises(InvalidInputError, match="ignore_labels: has 1001 labels, and 1000 are allowed"):
        ask(given, "token-classification", ["the model"], options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mask_of_a_text_in_windows_is_filled_once(name: str) -> None:
    given = family(name, "AutoModelForMaskedLM")
    mask = given.tokenizer.mask_token
    text = " ".join(f"the model {mask} reads" if i % 5 == 0 else "the words" for i in range(60))
    (got,) = ask(given, "fill-mask", [text], FillMaskOptions(top_k=1), long_texts="windows", stride=12)
    assert len(got) == 12
    whole = given.tokenizer(text)["input_ids"]
    first = whole.index(given.tokenizer.mask_token_id)
    whole[first] = got[0][0].token
    assert got[0][0].sequence == given.tokenizer.decode(whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_token_vectors_are_the_pipelines(name: str) -> None:
    given = family(name, "AutoModel")
    texts = [*TEXTS.values(), *EMPTY.values(), *LONG.values(), *lengths(given).values()]
    pipe = given.pipe("feature-extraction", tokenize_kwargs={"truncation": True, "max_length": LIMIT})
    for got, wanted in zip(ask(given, "token-embedding", texts, TokenEmbeddingOptions()), pipe(texts), strict=True):
        np.testing.assert_allclose(got, wanted[0], atol=1e-5)


@pytest.mark.parametrize("stride", [0, 5])
def test_a_text_in_windows_has_a_vector_for_each_of_its_tokens(stride: int) -> None:
    given = family("bert", "AutoModel")
    text = "the model reads " * 60
    (got,) = ask(given, "token-embedding", [text], TokenEmbeddingOptions(), long_texts="windows", stride=stride)
    assert len(got) == len(given.tokenizer(text)["input_ids"])

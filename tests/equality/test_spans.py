"""Entities, masks and answers to questions over HTTP, against transformers' pipelines and the rules of the last one
that answered questions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serve_app.config import ModelConfig
from serve_app.options import QuestionAnsweringOptions
from tests.equality.matrix import TOGETHER, Models, ask, assert_same, attentions, configs, refusal, texts_of
from tests.inprocess import served
from tests.tasks.families import FAMILIES, LIMIT, TEXTS, family
from tests.tasks.questions import answers

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
LONG = "Hugging Face Inc. was sent to New York, said they. The model reads one of it's words. " * 8


@pytest.fixture(scope="module")
def models() -> Models:
    return {
        f"{name}-{kind}": family(name, auto_class, **config)
        for name in FAMILIES
        for kind, auto_class, config in (
            ("entities", "AutoModelForTokenClassification", {"labels": LABELS}),
            ("masks", "AutoModelForMaskedLM", {"limit": 96}),
            ("questions", "AutoModelForQuestionAnswering", {}),
        )
    } | {"bert-left": family("bert", "AutoModelForTokenClassification", side="left", labels=LABELS)}


@pytest.fixture(scope="module")
def url(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(configs(models), tmp_path_factory.mktemp("cache"), **TOGETHER) as base:
        yield f"{base}/models"


@pytest.mark.parametrize("name", FAMILIES)
def test_entities_are_the_pipelines(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-entities"]
    texts = texts_of(given)
    options: list[dict[str, Any]] = [
        {},
        *({"aggregation_strategy": strategy} for strategy in ("none", "simple", "first", "average", "max", "FIRST")),
        {"aggregation_strategy": "simple", "ignore_labels": []},
        {"ignore_labels": ["B-PER", "MISC"]},
    ]
    got = ask(f"{url}/{name}-entities", [{"inputs": texts, "parameters": chosen} for chosen in options])
    for answer, chosen in zip(got, options, strict=True):
        pipe = given.pipe("token-classification", **chosen)
        assert_same(answer, [pipe(text) for text in texts])


def test_a_long_text_is_cut_where_the_models_tokenizer_cuts_it(url: str, models: Models) -> None:
    given, texts = models["bert-left"], [LONG, *texts_of(models["bert-left"])]
    pipe = given.pipe("token-classification")
    assert given.tokenizer.truncation_side == "left"
    plain, right = ask(
        f"{url}/bert-left",
        [{"inputs": texts}, {"inputs": texts, "parameters": {"truncation_direction": "right"}}],
    )
    assert_same(plain, [pipe(text) for text in texts])
    given.tokenizer.truncation_side = "right"
    assert_same(right, [pipe(text) for text in texts])
    assert plain != right


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_that_come_at_once_are_each_answered_as_alone(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-entities"]
    pipe, texts = given.pipe("token-classification"), texts_of(given)
    assert_same(ask(f"{url}/{name}-entities", [{"inputs": text} for text in texts]), [pipe(text) for text in texts])
    given = models[f"{name}-masks"]
    fill, texts = given.pipe("fill-mask"), [f"{text} {given.tokenizer.mask_token}" for text in TEXTS.values()]
    assert_same(ask(f"{url}/{name}-masks", [{"inputs": text} for text in texts]), [fill(text) for text in texts])
    given, options = models[f"{name}-questions"], QuestionAnsweringOptions()
    texts = [text for text in (*TEXTS.values(), LONG) if given.tokenizer.tokenize(text)]
    got = ask(f"{url}/{name}-questions", [{"inputs": {"question": "who?", "context": text}} for text in texts])
    assert_same(got, [answers(given, "who?", text, options)[0] for text in texts])


def test_every_model_is_computed_packed(url: str) -> None:
    assert attentions(url) == {"packed"}


@pytest.mark.parametrize("name", FAMILIES)
def test_entities_over_windows_are_the_pipelines(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-entities"]
    options = [
        {"aggregation_strategy": strategy, "stride": stride}
        for strategy in ("simple", "first", "average", "max")
        for stride in (0, 7)
    ]
    got = ask(f"{url}/{name}-entities", [{"inputs": LONG, "parameters": chosen} for chosen in options])
    for answer, chosen in zip(got, options, strict=True):
        assert_same(answer, given.pipe("token-classification", **chosen)(LONG))


@pytest.mark.parametrize("name", FAMILIES)
def test_fills_are_the_pipelines(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-masks"]
    mask = given.tokenizer.mask_token
    texts = [f"{text} {mask}" for text in TEXTS.values()]
    texts += [
        mask,
        f"the {mask} reads {mask} words.",
        f"{mask} model (yet) don't, . {mask}{mask}",
        f"{mask}{'w' * 9000}",
    ]
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 2},
        {"top_k": 3, "targets": ["the", "model", "reads"]},
        {"targets": ["unheard-of", "words"]},
        {"targets": "small"},
    ]
    pipe = given.pipe("fill-mask", tokenizer_kwargs={"truncation": True, "max_length": 96})
    got = ask(f"{url}/{name}-masks", [{"inputs": texts, "parameters": chosen} for chosen in options])
    for answer, chosen in zip(got, options, strict=True):
        assert_same(answer, [pipe(text, **chosen) for text in texts])


def test_a_text_without_a_mask_is_refused_as_by_the_pipeline(url: str, models: Models) -> None:
    given = models["bert-masks"]
    for text in ("", "no mask at all"):
        with pytest.raises(Exception, match="No mask_token"):
            given.pipe("fill-mask")(text)
        assert "no mask token" in refusal(f"{url}/bert-masks", {"inputs": ["[MASK]", text]})[1]


def test_a_mask_that_was_cut_off_is_told(url: str) -> None:
    text = f"{'the ' * 200} [MASK]"
    assert "was lost where the text was cut" in refusal(f"{url}/bert-masks", {"inputs": text})[1]
    assert "no mask token" in refusal(f"{url}/bert-masks", {"inputs": "the " * 200})[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_last_pipelines_rules(name: str, url: str, models: Models) -> None:
    given = models[f"{name}-questions"]
    contexts = [text for text in (*texts_of(given, empty=False), LONG) if given.tokenizer.tokenize(text)]
    asked = [{"question": "who reads?", "context": context} for context in contexts]
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 4},
        {"top_k": 3, "handle_impossible_answer": True},
        {"top_k": 3, "max_answer_len": 1},
        {"top_k": 2, "doc_stride": 3, "max_answer_len": 40},
        {"top_k": 2, "doc_stride": 0, "max_seq_len": 40},
        {"top_k": 5, "align_to_words": False},
    ]
    got = ask(f"{url}/{name}-questions", [{"inputs": asked, "parameters": chosen} for chosen in options])
    for answer, chosen in zip(got, options, strict=True):
        wanted = [answers(given, "who reads?", text, QuestionAnsweringOptions(**chosen)) for text in contexts]
        assert_same(answer, wanted if "top_k" in chosen else [each[0] for each in wanted])


@pytest.mark.parametrize("missing", ["question", "context"])
def test_an_empty_text_is_refused_as_by_the_last_pipeline(missing: str, url: str) -> None:
    """`SquadExample` of transformers 4.57 raises for both."""
    body = {"inputs": {"question": "who?", "context": "the model", missing: ""}}
    assert f"inputs.{missing}` is an empty text" in refusal(f"{url}/bert-questions", body)[1]


@pytest.mark.parametrize("kind", ["entities", "masks", "questions"])
def test_a_text_that_may_not_be_cut_is_refused_with_its_tokens_and_the_limit(kind: str, url: str) -> None:
    text = f"[MASK] {'the ' * 500}"
    inputs = {"question": "who?", "context": text} if kind == "questions" else text
    status, why = refusal(f"{url}/bert-{kind}", {"inputs": inputs, "parameters": {"truncate": False}})
    assert status == 422
    assert str(96 if kind == "masks" else LIMIT) in why


@pytest.mark.parametrize("kind", ["entities", "masks", "questions"])
def test_options_beside_the_inputs_count_as_those_among_the_parameters(kind: str, url: str) -> None:
    text = f"[MASK] {'the ' * 500}"
    inputs = {"question": "who?", "context": text} if kind == "questions" else text
    for more in ({}, {"parameters": {}}):
        assert refusal(f"{url}/bert-{kind}", {"inputs": inputs, "truncate": False, **more})[0] == 422


def test_a_target_that_the_model_does_not_know_is_the_clients_fault(tmp_path: Path) -> None:
    given = family("bert", "AutoModelForMaskedLM", limit=96)
    folder = Path(shutil.copytree(given.folder, tmp_path / "model"))
    words = AutoTokenizer.from_pretrained(str(folder))
    words.add_tokens(["beyond"])
    words.save_pretrained(folder)
    with served([ModelConfig(name="masks", source=str(folder), max_input_tokens=96)], tmp_path / "cache") as base:
        asked = {"inputs": "the [MASK] reads", "parameters": {"targets": ["the", "beyond"]}}
        status, why = refusal(f"{base}/models/masks", asked)
    assert status == 422
    assert "does not know" in why

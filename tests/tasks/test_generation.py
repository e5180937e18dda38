"""What is tokenized for tasks that generate, and what is refused before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.options import EmbeddingOptions, GenerationOptions
from serve_app.outputs import GeneratedPiece
from serve_app.tasks.generation import GENERATING, beams_of, collected, most_new_tokens
from serve_app.types import Chat, ChatMessage, GenerationDefaults, ModelCard, Request, TokenizeRequest

CARD = ModelCard(
    name="tiny",
    source="./tiny",
    revision="0",
    task="text-generation",
    model_type="llama",
    max_input_tokens=1000,
    hidden_size=16,
    pooling="mean",
    normalize=False,
)
T5 = replace(
    CARD,
    task="text2text-generation",
    model_type="t5",
    task_prefixes={
        "summarization": "summarize: ",
        "translation_en_to_de": "translate English to German: ",
        "translation_en_to_fr": "translate English to French: ",
    },
)
CHAT = Chat((ChatMessage("user", "hello"),))


def prepare(task: str, card: ModelCard, text: Any = "hello", long_texts: Any = None, **options: Any) -> TokenizeRequest:
    request = Request("id", "tiny", task, (text,), GenerationOptions(**options), long_texts=long_texts)
    return GENERATING[task].prepare(request, card)


def test_a_prompt_that_is_cut_is_cut_on_the_left_and_leaves_room_for_the_answer() -> None:
    asked = prepare("text-generation", CARD, max_new_tokens=100)
    assert (asked.long_texts, asked.truncation_side, asked.max_tokens) == ("truncate", "left", 900)


@pytest.mark.parametrize("task", GENERATING)
@pytest.mark.parametrize(("asked", "own"), [("left", "right"), ("right", "left"), (None, "left"), (None, "right")])
def test_the_side_of_a_prompt_that_is_cut_is_the_requests_else_the_models(task: str, asked: Any, own: Any) -> None:
    request = Request("id", "tiny", task, ("hello",), GenerationOptions(source_language="en", target_language="de"))
    tokenize = GENERATING[task].prepare(replace(request, truncation_side=asked), replace(T5, truncation_side=own))
    assert tokenize.truncation_side == (asked or own)


def test_room_for_an_answer_is_at_most_a_quarter_of_the_window() -> None:
    assert prepare("text-generation", CARD, max_new_tokens=5000).max_tokens == 750
    assert prepare("text-generation", CARD).max_tokens == 750


def test_a_prompt_that_is_not_cut_may_leave_room_for_one_token() -> None:
    asked = prepare("text-generation", CARD, long_texts="error", max_new_tokens=100)
    assert (asked.long_texts, asked.max_tokens) == ("error", 999)


@pytest.mark.parametrize(("task", "card"), [("text-generation", CARD), ("summarization", T5)])
def test_a_prompt_of_so_many_tokens_is_what_was_asked_for(task: str, card: ModelCard) -> None:
    assert prepare(task, card, prompt_tokens=5).max_tokens == 5
    with pytest.raises(InvalidInputError, match="1 to 1000"):
        prepare(task, card, prompt_tokens=1001)


def test_a_prompt_of_so_many_tokens_still_leaves_room_for_the_answer() -> None:
    assert prepare("text-generation", CARD, prompt_tokens=1000, max_new_tokens=100).max_tokens == 900


def test_what_an_encoder_reads_shares_its_window_with_no_answer() -> None:
    asked = prepare("summarization", T5, max_new_tokens=100)
    assert (asked.max_tokens, asked.truncation_side) == (None, "right")


def test_texts_begin_with_what_the_model_was_trained_to_see() -> None:
    assert prepare("summarization", T5).prompt == "summarize: "
    assert prepare("text2text-generation", T5).prompt == ""
    assert prepare("summarization", replace(T5, task_prefixes={})).prompt == ""
    chosen = {"source_language": "en", "target_language": "fr"}
    assert prepare("translation", T5, **chosen).prompt == "translate English to French: "
    assert prepare("translation", replace(T5, model_type="marian"), target_language="fra").prompt == ">>fra<< "


def test_a_language_must_be_one_that_the_model_translates() -> None:
    with pytest.raises(InvalidInputError, match="en to de, en to fr"):
        prepare("translation", T5)
    with pytest.raises(InvalidInputError, match="en to de, en to fr"):
        prepare("translation", T5, source_language="de", target_language="en")


@pytest.mark.parametrize(
    ("task", "card", "text", "options", "told"),
    [
        ("text-generation", CARD, "hello", {"long_texts": "windows"}, "windows"),
        ("text-generation", CARD, CHAT, {}, "chat template"),
        ("summarization", replace(T5, can_chat=True), CHAT, {}, "conversations"),
        ("text-generation", CARD, ("a", "b"), {}, "pairs"),
        ("summarization", T5, "hello", {"echo": True}, "echo"),
    ],
)
def test_what_makes_no_sense_is_refused(
    task: str, card: ModelCard, text: Any, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        prepare(task, card, text, **options)


def test_options_of_another_task_are_refused() -> None:
    with pytest.raises(MalformedRequestError):
        GENERATING["text-generation"].prepare(Request("id", "tiny", "x", ("a",), EmbeddingOptions()), CARD)


def test_pieces_make_the_whole() -> None:
    pieces = [GeneratedPiece("a", 5), GeneratedPiece("", 6), GeneratedPiece("bc", None, finish_reason="length")]
    whole = collected(pieces)
    assert (whole.text, whole.tokens, whole.finish_reason) == ("abc", (5, 6), "length")


@pytest.mark.parametrize(("task", "card"), [("text-generation", CARD), ("summarization", T5)], ids=["decoder", "both"])
@pytest.mark.parametrize("asked", [{}, {"max_new_tokens": 7}, {"max_length": 90}, {"max_new_tokens": 5000}], ids=str)
@pytest.mark.parametrize("own", [{}, {"max_new_tokens": 11}, {"max_length": 80}, {"max_length": 5}], ids=str)
def test_an_answer_is_reckoned_as_long_as_the_model_replica_lets_it_be(
    task: str, card: ModelCard, asked: dict[str, int], own: dict[str, int]
) -> None:
    from transformers import GenerationConfig

    from serve_app.model.generation.sampling import new_tokens

    request = Request("id", "tiny", task, ("hello",), GenerationOptions(**asked))
    model, before = SimpleNamespace(generation_config=GenerationConfig(**own)), 1 if card is T5 else 40
    allowed = min(new_tokens(model, request.options, before), card.max_input_tokens - before)  # type: ignore[arg-type]
    defaults = replace(card, generation=GenerationDefaults(**own))
    assert most_new_tokens(request, defaults, prompt_tokens=40) == allowed


@pytest.mark.parametrize(("asked", "own", "beams"), [(None, 1, 1), (None, 4, 4), (1, 4, 1), (3, 1, 3)])
def test_beams_are_the_requests_else_the_models(asked: int | None, own: int, beams: int) -> None:
    card = replace(CARD, generation=GenerationDefaults(num_beams=own))
    assert beams_of(GenerationOptions(num_beams=asked), card) == beams

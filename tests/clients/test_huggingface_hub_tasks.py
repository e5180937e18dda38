"""huggingface_hub.InferenceClient, sync and async, with every task of its table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import (
    GenerationError,
    HfHubHTTPError,
    IncompleteGenerationError,
    TextGenerationError,
    ValidationError,
)
from huggingface_hub.errors import OverloadedError as HubOverloadedError

from serve_app import errors
from serve_app.ingress.protocols.huggingface.endpoint import BODIES
from tests.ingress.edge import FakeService, edge_app, served_in_thread

SERVICE = FakeService(*BODIES, tasks={task: task for task in BODIES})


@pytest.fixture(scope="module")
def all_tasks() -> Iterator[str]:
    """A server with a model of each task, named for it."""
    with served_in_thread(edge_app(SERVICE)) as url:
        yield url


def client(all_tasks: str, task: str) -> InferenceClient:
    return InferenceClient(f"{all_tasks}/models/{task}", timeout=60)


def test_text_classification(all_tasks: str) -> None:
    found = client(all_tasks, "text-classification").text_classification("a", top_k=2, function_to_apply="softmax")
    assert [(each.label, each.score) for each in found] == [("POSITIVE", 0.75), ("NEGATIVE", 0.25)]


def test_zero_shot_classification(all_tasks: str) -> None:
    zero_shot = client(all_tasks, "zero-shot-classification")
    found = zero_shot.zero_shot_classification("a", ["x", "y"], multi_label=True, hypothesis_template="It is {}.")
    assert [each.label for each in found] == ["x", "y"]


def test_relevance_as_sentence_similarity(all_tasks: str) -> None:
    assert client(all_tasks, "rerank").sentence_similarity("a", other_sentences=["b", "c"]) == [0.0, 0.125]


def test_token_classification(all_tasks: str) -> None:
    tokens = client(all_tasks, "token-classification")
    (entity,) = tokens.token_classification("my name is sarah", aggregation_strategy="simple", stride=3)
    assert (entity.entity_group, entity.word, entity.start, entity.end) == ("PER", "sarah", 11, 16)
    assert tokens.token_classification("my name is sarah")[0].entity == "PER"


def test_fill_mask(all_tasks: str) -> None:
    fills = client(all_tasks, "fill-mask").fill_mask("the [MASK]", top_k=2, targets=["capital", "heart"])
    assert [fill.token_str for fill in fills] == ["capital", "heart"]


def test_question_answering(all_tasks: str) -> None:
    asks = client(all_tasks, "question-answering")
    best = asks.question_answering(question="where?", context="in London", align_to_words=True)
    assert (best.answer, best.start, best.end) == ("London", 3, 9)  # type: ignore[union-attr]
    assert len(asks.question_answering(question="where?", context="in London", top_k=2)) == 2  # type: ignore[arg-type]


def test_summarization_and_translation(all_tasks: str) -> None:
    summary = client(all_tasks, "summarization").summarization("a", generate_parameters={"max_new_tokens": 5})
    assert summary.summary_text == "Once upon a time"
    translation = client(all_tasks, "translation").translation("a", src_lang="en", tgt_lang="de")
    assert translation.translation_text == "Once upon a time"


def test_text_generation_whole_and_in_pieces(all_tasks: str) -> None:
    generates = client(all_tasks, "text-generation")
    whole = generates.text_generation("a", max_new_tokens=5)
    assert whole == "".join(generates.text_generation("a", stream=True)) == "Once upon a time"


def test_text_generation_with_details(all_tasks: str) -> None:
    generates = client(all_tasks, "text-generation")
    answer = generates.text_generation("a", details=True, seed=3, stop=["."], temperature=0.7, top_k=5, top_p=0.9)
    assert answer.details is not None
    assert [token.text for token in answer.details.tokens] == ["Once", " upon", " a", " time"]
    pieces = list(generates.text_generation("a", details=True, stream=True))
    assert pieces[-1].generated_text == "Once upon a time"
    assert pieces[-1].details is not None
    assert (pieces[-1].details.finish_reason, pieces[-1].details.input_length) == ("eos_token", 6)
    assert [piece.token.id for piece in pieces[:2]] == [10, 11]


def test_text_generation_of_so_many_tokens_of_the_prompt(all_tasks: str) -> None:
    generates = client(all_tasks, "text-generation")
    generates.text_generation("a", truncate=5)
    list(generates.text_generation("a", truncate=6, stream=True))
    asked = [request.options for request in SERVICE.requests[-2:]]
    assert [getattr(each, "prompt_tokens", None) for each in asked] == [5, 6]


def test_text_generation_of_a_model_that_makes_texts_of_texts(all_tasks: str) -> None:
    generates = client(all_tasks, "text2text-generation")
    assert "".join(generates.text_generation("a", stream=True)) == "Once upon a time"
    answer = generates.text_generation("a", details=True, max_new_tokens=5)
    assert answer.details is not None
    assert [token.text for token in answer.details.tokens] == ["Once", " upon", " a", " time"]
    pieces = list(generates.text_generation("a", details=True, stream=True, truncate=5))
    assert pieces[-1].generated_text == "Once upon a time"


def test_summarization_takes_what_generate_takes_and_refuses_the_rest_by_name(all_tasks: str) -> None:
    summarizes = client(all_tasks, "summarization")
    chosen = {"max_length": 60, "min_length": 10, "num_beams": 4, "length_penalty": 2.0, "early_stopping": True}
    assert summarizes.summarization("a", generate_parameters=chosen).summary_text == "Once upon a time"
    with pytest.raises(HfHubHTTPError, match="num_return_sequences"):
        summarizes.summarization("a", generate_parameters={**chosen, "num_return_sequences": 2})


def test_text_generation_errors_are_the_clients_own(all_tasks: str) -> None:
    generates = client(all_tasks, "text-generation")
    with pytest.raises(ValidationError, match="best_of"):
        generates.text_generation("a", best_of=3)
    with pytest.raises(ValidationError, match="frequency_penalty`: is not supported"):
        generates.text_generation("a", frequency_penalty=0.5)


@pytest.mark.parametrize("task", ["text-generation", "text2text-generation"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (errors.OverloadedError, HubOverloadedError),
        (errors.ModelFailureError, GenerationError),
        (errors.UnavailableError, GenerationError),
        (errors.DeadlineExceededError, GenerationError),
        (errors.InvalidInputError, ValidationError),
    ],
)
def test_an_answer_that_fails_is_the_clients_own_error(
    all_tasks: str, task: str, stream: bool, failure: type[errors.ServeAppError], raised: type[TextGenerationError]
) -> None:
    generates = client(all_tasks, task)
    with failing(failure("why it failed")), pytest.raises(raised, match="why it failed"):
        generates.text_generation("a", stream=stream)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (errors.UnavailableError, IncompleteGenerationError),
        (errors.DeadlineExceededError, IncompleteGenerationError),
        (errors.ServerError, IncompleteGenerationError),
        (errors.ModelFailureError, GenerationError),
        (errors.OverloadedError, HubOverloadedError),
    ],
)
def test_a_stream_that_breaks_off_is_the_clients_own_error(
    all_tasks: str, failure: type[errors.ServeAppError], raised: type[TextGenerationError]
) -> None:
    generates = client(all_tasks, "text-generation")
    with failing(failure("why it broke off"), pieces=2), pytest.raises(raised, match="why it broke off"):
        list(generates.text_generation("a", stream=True))


@contextlib.contextmanager
def failing(error: errors.ServeAppError, pieces: int = 0) -> Iterator[None]:
    SERVICE.failure, SERVICE.pieces_before_failure = error, pieces
    try:
        yield
    finally:
        SERVICE.failure, SERVICE.pieces_before_failure = None, 0


def test_chat_whole_and_in_pieces(all_tasks: str) -> None:
    chats = client(all_tasks, "text-generation")
    messages = [{"role": "user", "content": "hello"}]
    answer = chats.chat_completion(messages, max_tokens=5, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "Once upon a time"
    assert answer.usage.completion_tokens == 4
    pieces = [piece.choices[0].delta.content for piece in chats.chat_completion(messages, stream=True)]
    assert "".join(piece or "" for piece in pieces) == "Once upon a time"


async def test_the_async_client_gets_the_same(all_tasks: str) -> None:
    async with AsyncInferenceClient(f"{all_tasks}/models/text-generation", timeout=60) as generates:
        pieces = [piece async for piece in await generates.text_generation("a", stream=True)]
        chat = await generates.chat_completion([{"role": "user", "content": "hello"}])
    async with AsyncInferenceClient(f"{all_tasks}/models/text-classification", timeout=60) as classifies:
        labels = await classifies.text_classification("a")
    assert "".join(pieces) == chat.choices[0].message.content == "Once upon a time"
    assert labels[0].label == "POSITIVE"

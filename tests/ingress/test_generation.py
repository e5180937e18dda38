"""A generating model's way through the tiers: retries, errors, deadlines, and what a client's leaving ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve_app.errors import DeadlineExceededError, InputTooLongError, OverloadedError, UnavailableError
from serve_app.ingress import generation
from serve_app.ingress.generation import GenerationPath
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece
from serve_app.types import GenerationCall, Request
from tests.ingress.tiers import Recorder, Tiers
from tests.tasks.test_generation import CARD

ANSWER = [[GeneratedPiece("a", 1)], [GeneratedPiece("b", 2), GeneratedPiece("c", 3, finish_reason="length")]]


class Response:
    """What a handle gives for a streaming call: messages, then perhaps an error or nothing more for ever."""

    def __init__(self, messages: list[Any], cancelled: list[str]) -> None:
        self._messages = iter(messages)
        self._cancelled = cancelled

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = next(self._messages, StopAsyncIteration())
        if message == "hang":
            await asyncio.sleep(3600)
        if isinstance(message, BaseException):
            raise message
        return message

    def cancel(self) -> None:
        self._cancelled.append("cancelled")


class Model:
    """A handle to replicas that answer each call with the next of `answers`."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.calls: list[GenerationCall] = []
        self.cancelled: list[str] = []

    def options(self, *, stream: bool) -> Model:
        assert stream
        return self

    @property
    def stream(self) -> Model:
        return self

    def remote(self, call: GenerationCall) -> Response:
        self.calls.append(call)
        return Response(self.answers.pop(0), self.cancelled)


class Metrics:
    def __init__(self) -> None:
        self.retries = Recorder()
        self.abandoned_requests = Recorder()


def path_to(model: Model, tiers: Tiers | None = None, metrics: Metrics | None = None) -> GenerationPath:
    return GenerationPath("tiny", tiers or Tiers(), model, metrics or Metrics())  # type: ignore[arg-type]


def request(*texts: str) -> Request:
    return Request("id", "tiny", "text-generation", texts or ("hello",), GenerationOptions(max_new_tokens=3))


async def streamed(path: GenerationPath, timeout_s: float = 60.0) -> list[str]:
    async with aclosing(path.stream(request(), CARD, timeout_s)) as pieces:
        return [piece.text async for piece in pieces]


async def test_pieces_come_as_the_replica_made_them() -> None:
    model = Model(ANSWER)
    assert await streamed(path_to(model)) == ["a", "b", "c"]
    [call] = model.calls
    assert call.input_ids.tolist() == [ord(character) for character in "hello"]
    assert call.time_left_s is not None
    assert model.cancelled == []


async def test_each_input_has_its_own_answer() -> None:
    answer = await path_to(Model(ANSWER, ANSWER)).answer(request("one", "two"), CARD, 60.0)
    assert [whole.text for whole in answer.output] == ["abc", "abc"]  # type: ignore[union-attr]
    assert answer.tokens == 6


async def test_prompts_are_repeated_where_that_is_wanted() -> None:
    answer = await path_to(Model(ANSWER)).answer(request(), CARD, 60.0, ["hello "])
    assert [whole.text for whole in answer.output] == ["hello abc"]  # type: ignore[union-attr]


@pytest.mark.parametrize("echo", ["", "hello "])
async def test_the_first_piece_tells_that_the_prompt_was_cut(echo: str) -> None:
    for text, cut in (("hello", False), ("hello!", True)):
        async with aclosing(path_to(Model(ANSWER)).stream(request(text), CARD, 60.0, echo)) as pieces:
            first, *others = [piece.truncated async for piece in pieces]
        assert first is cut
        assert not any(others)


async def test_a_replica_lost_before_anything_came_is_asked_again_once() -> None:
    assert await streamed(path_to(Model([RayActorError()], ANSWER))) == ["a", "b", "c"]
    with pytest.raises(UnavailableError):
        await streamed(path_to(Model([RayActorError()], [RayActorError()], ANSWER)))


@pytest.mark.parametrize("end", [RayActorError(), StopAsyncIteration()], ids=["lost", "ended early"])
async def test_a_replica_lost_midway_is_not_asked_again(end: Exception) -> None:
    model = Model([ANSWER[0], end], ANSWER)
    with pytest.raises(UnavailableError):
        await streamed(path_to(model))
    assert len(model.calls) == 1


@pytest.mark.parametrize("error", [OverloadedError("full"), InputTooLongError("long")], ids=["full", "too long"])
async def test_the_replicas_own_errors_are_raised_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)):
        await streamed(path_to(Model([error])))


async def test_a_text_that_cannot_be_tokenized_asks_no_replica() -> None:
    model = Model()
    with pytest.raises(InputTooLongError):
        await path_to(model).answer(request("bad"), CARD, 60.0)
    assert model.calls == []


async def test_a_replica_that_says_nothing_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GRACE_S", 0.01)
    model = Model([ANSWER[0], "hang"])
    with pytest.raises(DeadlineExceededError):
        await streamed(path_to(model), timeout_s=0.01)
    assert model.cancelled == ["cancelled"]


async def test_leaving_cancels_the_replicas_work() -> None:
    model = Model([ANSWER[0], "hang"])
    pieces = path_to(model).stream(request(), CARD, 60.0)
    assert (await anext(pieces)).text == "a"
    await pieces.aclose()
    assert model.cancelled == ["cancelled"]


async def test_a_client_that_leaves_a_stream_is_counted() -> None:
    metrics = Metrics()
    pieces = path_to(Model([ANSWER[0], "hang"]), metrics=metrics).stream(request(), CARD, 60.0)
    await anext(pieces)
    await pieces.aclose()
    assert metrics.abandoned_requests.tags == [{"model": "tiny", "stage": "model"}]


async def test_a_client_that_leaves_before_the_first_piece_is_counted_once() -> None:
    metrics, tiers = Metrics(), Tiers()
    tiers.tokenize.go.clear()
    path = path_to(Model(["hang"], ["hang"]), tiers, metrics)
    for work in (anext(path.stream(request(), CARD, 60.0)), path.answer(request("one", "two"), CARD, 60.0)):
        working = asyncio.ensure_future(work)  # type: ignore[arg-type]
        await tiers.tokenize.called.wait()
        tiers.tokenize.called.clear()
        working.cancel()
        await asyncio.wait((working,))
    assert metrics.abandoned_requests.tags == [{"model": "tiny", "stage": "tokenize"}] * 2


async def test_a_stream_that_is_complete_is_not_counted() -> None:
    metrics = Metrics()
    pieces = path_to(Model(ANSWER), metrics=metrics).stream(request(), CARD, 60.0)
    while (await anext(pieces)).finish_reason is None:
        pass
    await pieces.aclose()
    assert metrics.abandoned_requests.values == []

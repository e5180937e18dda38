"""A generating model's way through the tiers: retries, errors, deadlines, and what a client's leaving ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from serve_app.errors import (
    DeadlineExceededError,
    InputTooLongError,
    OverloadedError,
    UnavailableError,
    VersionGoneError,
)
from serve_app.ingress import generation, shared_call
from serve_app.ingress.generation import GenerationPath
from serve_app.ingress.tier import Tier, TierView
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece
from serve_app.types import Forget, GenerationCall, Request
from tests.ingress.tiers import Method, Recorder, Tiers, replica_id
from tests.tasks.test_generation import CARD

ANSWER = [[GeneratedPiece("a", 1)], [GeneratedPiece("b", 2), GeneratedPiece("c", 3, finish_reason="length")]]


class Response:
    """What a handle gives for a streaming call: messages, then perhaps an error or nothing more for ever."""

    def __init__(self, messages: list[Any], cancelled: list[str]) -> None:
        self._messages = iter(messages)
        self._cancelled = cancelled
        self._hanging: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = next(self._messages, StopAsyncIteration())
        if message == "hang":
            self._hanging = asyncio.ensure_future(asyncio.sleep(3600))
            await self._hanging
        if isinstance(message, asyncio.Event):
            await message.wait()
            return await anext(self)
        if isinstance(message, BaseException):
            raise message
        return message

    def cancel(self) -> None:
        self._cancelled.append("cancelled")
        if self._hanging is not None:
            self._hanging.cancel()


class Model:
    """A handle to replicas that answer each call with the next of `answers`."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.calls: list[GenerationCall] = []
        self.cancelled: list[str] = []
        self.forget: Method[Forget, bool] = Method(lambda forget: False)

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


def path_to(
    model: Model, tiers: Tiers | None = None, view: TierView | None = None, metrics: Metrics | None = None
) -> GenerationPath:
    tokenizer = (tiers or Tiers()).tier
    return GenerationPath("tiny", tokenizer, Tier(model, view or TierView()), metrics or Metrics())  # type: ignore[arg-type]


def request(*texts: str) -> Request:
    return Request("id", "tiny", "text-generation", texts or ("hello",), GenerationOptions(max_new_tokens=3))


async def streamed(path: GenerationPath, timeout_s: float = 60.0) -> list[str]:
    async with aclosing(path.stream(request(), CARD, "v1", timeout_s)) as pieces:
        return [piece.text async for piece in pieces]


async def test_pieces_come_as_the_replica_made_them() -> None:
    model = Model(ANSWER)
    assert await streamed(path_to(model)) == ["a", "b", "c"]
    [call] = model.calls
    assert call.input_ids.tolist() == [ord(character) for character in "hello"]
    assert call.time_left_s is not None
    assert model.cancelled == []


async def test_each_input_has_its_own_answer() -> None:
    answer = await path_to(Model(ANSWER, ANSWER)).answer(request("one", "two"), CARD, "v1", 60.0)
    assert [whole.text for whole in answer.output] == ["abc", "abc"]  # type: ignore[union-attr]
    assert answer.tokens == 6


async def test_prompts_are_repeated_where_that_is_wanted() -> None:
    answer = await path_to(Model(ANSWER)).answer(request(), CARD, "v1", 60.0, ["hello "])
    assert [whole.text for whole in answer.output] == ["hello abc"]  # type: ignore[union-attr]


@pytest.mark.parametrize("echo", ["", "hello "])
async def test_the_first_piece_tells_that_the_prompt_was_cut(echo: str) -> None:
    for text, cut in (("hello", False), ("hello!", True)):
        async with aclosing(path_to(Model(ANSWER)).stream(request(text), CARD, "v1", 60.0, echo)) as pieces:
            first, *others = [piece.truncated async for piece in pieces]
        assert first is cut
        assert not any(others)


async def test_a_replica_lost_before_anything_came_is_asked_again_once() -> None:
    assert await streamed(path_to(Model([RayActorError()], ANSWER))) == ["a", "b", "c"]
    with pytest.raises(UnavailableError):
        await streamed(path_to(Model([RayActorError()], [RayActorError()], ANSWER)))


class Mortal(Model):
    """One replica after the other: each dies, with all calls that it has, of a prompt that is `DEADLY`."""

    DEADLY = "deadly"

    def __init__(self) -> None:
        super().__init__()
        self.deaths = 0
        self.together: list[int] = []
        """How many calls the replica had when each came."""
        self._replica = asyncio.Event()
        self._waiting: set[str] = set()

    def remote(self, call: GenerationCall) -> Any:
        self.calls.append(call)
        return self._pieces(call)

    def _pieces(self, call: GenerationCall) -> Any:
        class Pieces:
            def __init__(self, pieces: Any) -> None:
                self._pieces = pieces

            async def __anext__(self) -> Any:
                return await anext(self._pieces)

            def cancel(self) -> None: ...

        return Pieces(self._made(call))

    async def _made(self, call: GenerationCall) -> AsyncIterator[list[GeneratedPiece]]:
        replica = self._replica
        self._waiting.add(call.id)
        self.together.append(len(self._waiting))
        try:
            is_deadly = call.input_ids.tolist() == [ord(character) for character in self.DEADLY]
            for _ in range(10 if is_deadly else 20):  # in which others come
                await asyncio.sleep(0)
            if is_deadly and not replica.is_set():
                self.deaths += 1
                replica.set()
                self._replica, self._waiting = asyncio.Event(), set()
            if replica.is_set():
                raise RayActorError
        finally:
            self._waiting.discard(call.id)
        for some in ANSWER:
            yield some


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("streams", [True, False], ids=["streams", "answers"])
async def test_a_prompt_that_kills_its_replicas_takes_one_more_with_it_and_no_other_request(
    place: int, streams: bool
) -> None:
    model, metrics = Mortal(), Metrics()
    path = path_to(model, metrics=metrics)
    texts = [f"text {i}" for i in range(6)]
    texts[place] = Mortal.DEADLY

    async def ask(text: str) -> str:
        if not streams:
            (whole,) = (await path.answer(request(text), CARD, "v1", 60.0)).output
            return whole.text  # type: ignore[union-attr]
        async with aclosing(path.stream(request(text), CARD, "v1", 60.0)) as pieces:
            return "".join([piece.text async for piece in pieces])

    outcomes = await asyncio.gather(*map(ask, texts), return_exceptions=True)
    failed = outcomes.pop(place)
    assert isinstance(failed, UnavailableError)
    assert "not sent a third time" in failed.message
    assert outcomes == ["abc"] * 5
    assert model.deaths == 2
    assert model.together == [1, 2, 3, 4, 5, 6] + [1] * 6, "the second time each by itself"
    assert metrics.retries.values == [1] * 6


async def test_each_prompt_of_a_request_may_be_lost_once() -> None:
    model = Model(*[[RayActorError()]] * 3, *[ANSWER] * 3)
    answer = await path_to(model).answer(request("one", "two", "three"), CARD, "v1", 60.0)
    assert [whole.text for whole in answer.output] == ["abc"] * 3  # type: ignore[union-attr]
    with pytest.raises(UnavailableError, match="not sent a third time"):
        await path_to(Model(*[[RayActorError()]] * 6)).answer(request("one", "two", "three"), CARD, "v1", 60.0)


@pytest.mark.parametrize("lost_at", ["tokenizer", "model"])
async def test_what_was_lost_with_another_version_counts(lost_at: str) -> None:
    tiers, model = Tiers(), Model([RayActorError()], ANSWER)
    losses: set[int] = set()
    if lost_at == "tokenizer":
        model.answers = [ANSWER]
        tiers.tokenize.failures = [RayActorError(), VersionGoneError("gone"), RayActorError()]
    else:
        tiers.tokenize.failures = []
        model.answers = [[RayActorError()], [VersionGoneError("gone")], [RayActorError()], ANSWER]
    path = path_to(model, tiers)
    with pytest.raises(VersionGoneError):
        await path.answer(request(), CARD, "v1", 60.0, losses=losses)
    with pytest.raises(UnavailableError, match="not sent a third time"):
        await path.answer(request(), CARD, "v2", 60.0, losses=losses)


async def test_a_request_whose_turn_does_not_come_in_time_goes_beside_the_others() -> None:
    go = asyncio.Event()
    model = Model([RayActorError()], [go, *ANSWER], [RayActorError()], ANSWER)
    path = path_to(model)
    waits = asyncio.create_task(streamed(path))
    while len(model.calls) < 2:
        await asyncio.sleep(0)
    assert await streamed(path, timeout_s=0.1) == ["a", "b", "c"]
    go.set()
    assert await waits == ["a", "b", "c"]


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
        await path_to(model).answer(request("bad"), CARD, "v1", 60.0)
    assert model.calls == []


async def test_a_replica_that_says_nothing_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GRACE_S", 0.01)
    model = Model([ANSWER[0], "hang"])
    with pytest.raises(DeadlineExceededError):
        await streamed(path_to(model), timeout_s=0.01)
    assert model.cancelled == ["cancelled"]


async def test_leaving_cancels_the_replicas_work() -> None:
    model = Model([ANSWER[0], "hang"])
    pieces = path_to(model).stream(request(), CARD, "v1", 60.0)
    assert (await anext(pieces)).text == "a"
    await pieces.aclose()
    assert model.cancelled == ["cancelled"]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_call, "PULSE_S", 0.001)
    monkeypatch.setattr(shared_call, "PULSE_TIMEOUT_S", 0.01)


@pytest.mark.usefixtures("_quick")
async def test_a_replica_that_falls_silent_before_anything_came_loses_its_call_which_is_sent_again() -> None:
    model, view = Model(["hang"], ANSWER), TierView()
    model.forget.go.clear()
    asked = asyncio.create_task(streamed(path_to(model, view=view)))
    while not model.calls:
        await asyncio.sleep(0)
    view.sent(replica_id("a"), model.calls[0].id, 1)  # as the router tells
    assert await asyncio.wait_for(asked, 30) == ["a", "b", "c"]
    assert model.forget.calls[0] == Forget(model.calls[0].id, ())
    assert model.calls[0].id != model.calls[1].id
    assert model.cancelled[0] == "cancelled"
    assert view.rank(replica_id("a"))[0], "it is distrusted"


@pytest.mark.usefixtures("_quick")
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="needs Python 3.11, from which on tasks tell that they are cancelled"
)
async def test_a_client_that_leaves_in_the_moment_in_which_its_replica_is_given_up_has_left() -> None:
    class Leaving(Model):
        def remote(self, call: GenerationCall) -> Response:
            response = super().remote(call)
            give_up = response.cancel

            def cancel() -> None:
                give_up()
                if not self.cancelled[1:]:
                    asked.cancel()

            response.cancel = cancel  # type: ignore[method-assign]
            return response

    model = Leaving(["hang"], ANSWER)
    model.forget.go.clear()
    asked = asyncio.create_task(streamed(path_to(model)))
    await asyncio.wait((asked,), timeout=30)
    assert asked.cancelled()
    assert len(model.calls) == 1


@pytest.mark.usefixtures("_quick")
async def test_a_replica_that_falls_silent_midway_ends_the_answer() -> None:
    model = Model([ANSWER[0], "hang"], ANSWER)
    model.forget.go.clear()
    with pytest.raises(UnavailableError, match="fell silent"):
        await asyncio.wait_for(streamed(path_to(model)), 30)
    assert len(model.calls) == 1


@pytest.mark.usefixtures("_quick")
async def test_a_replica_that_says_that_it_cannot_compute_loses_its_call_which_is_sent_again() -> None:
    model, view = Model(["hang"], ANSWER), TierView()
    hangs = UnavailableError("the device hangs")
    model.forget.failures = [RayTaskError("forget", "traceback", hangs).as_instanceof_cause()]
    asked = asyncio.create_task(streamed(path_to(model, view=view)))
    while not model.calls:
        await asyncio.sleep(0)
    view.sent(replica_id("a"), model.calls[0].id, 1)
    assert await asyncio.wait_for(asked, 30) == ["a", "b", "c"]
    assert model.cancelled == ["cancelled"] * 2
    assert view.rank(replica_id("a"))[0], "it is distrusted"


async def test_a_replica_that_gives_a_call_back_gets_none_while_others_take_them() -> None:
    go, view = asyncio.Event(), TierView()
    model = Model([go, UnavailableError("the device hangs")], ANSWER)
    asked = asyncio.create_task(streamed(path_to(model, view=view)))
    while not model.calls:
        await asyncio.sleep(0)
    view.sent(replica_id("a"), model.calls[0].id, 1)
    view.ended(replica_id("a"), model.calls[0].id, 1)
    go.set()
    assert await asked == ["a", "b", "c"]
    assert view.rank(replica_id("a"))[0]


async def test_a_client_that_leaves_in_the_moment_of_an_answer_has_left() -> None:
    """`asyncio.wait_for` loses such a cancellation up to Python 3.11."""
    for turns in range(6):
        go, tiers = asyncio.Event(), Tiers()
        model = Model([go, ANSWER[0], "hang"])
        asked = asyncio.create_task(streamed(path_to(model, tiers)))
        while not model.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        go.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait((asked,), timeout=5)
        assert asked.cancelled(), turns


@pytest.mark.usefixtures("_quick")
async def test_a_replica_that_says_that_it_lives_keeps_its_long_answer() -> None:
    go = asyncio.Event()
    model, view = Model([ANSWER[0], go, ANSWER[1]]), TierView()
    asked = asyncio.create_task(streamed(path_to(model, view=view)))
    while len(model.forget.calls) < 20:
        await asyncio.sleep(0.001)
    go.set()
    assert await asked == ["a", "b", "c"]
    assert len(model.calls) == 1
    questions = len(model.forget.calls)
    await asyncio.sleep(0.05)
    assert len(model.forget.calls) == questions


@pytest.mark.usefixtures("_quick")
async def test_a_tokenizer_that_falls_silent_is_asked_again_once() -> None:
    tiers = Tiers()
    tiers.tokenize.go.clear()
    tiers.forget.go.clear()
    asked = asyncio.create_task(streamed(path_to(Model(ANSWER), tiers)))
    while not (tiers.tokenize.responses and tiers.tokenize.responses[0].cancelled()):
        await asyncio.sleep(0.001)
    tiers.tokenize.go.set()
    assert await asked == ["a", "b", "c"]
    assert len(tiers.tokenize.calls) == 2


@pytest.mark.parametrize("at", ["tokenizer", "model"])
async def test_a_version_that_is_gone_is_told_and_no_replica_asked_again(at: str) -> None:
    tiers, model = Tiers(), Model([VersionGoneError("gone")], ANSWER)
    if at == "tokenizer":
        tiers.tokenize.failures = [VersionGoneError("gone")]
    with pytest.raises(VersionGoneError):
        await streamed(path_to(model, tiers))
    assert (len(tiers.tokenize.calls), len(model.calls)) == (1, int(at == "model"))


async def test_a_request_of_many_prompts_holds_only_so_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "CALLS_PER_REQUEST", 3)
    go = asyncio.Event()
    model = Model(*[[go, *ANSWER]] * 10)
    answering = asyncio.create_task(path_to(model).answer(request(*map(str, range(10))), CARD, "v1", 60.0))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(model.calls) == 3
    go.set()
    assert len((await answering).output) == 10
    assert len(model.calls) == 10


async def test_every_call_is_for_the_version_that_was_asked_for() -> None:
    tiers, model = Tiers(), Model(ANSWER, ANSWER)
    path = path_to(model, tiers)
    await path.answer(request(), CARD, "v7", 60.0)
    await path.probe("v8", 60.0)
    assert [call.version for call in tiers.tokenize.calls] == [call.version for call in model.calls] == ["v7", "v8"]


async def test_a_client_that_leaves_a_stream_is_counted() -> None:
    metrics = Metrics()
    pieces = path_to(Model([ANSWER[0], "hang"]), metrics=metrics).stream(request(), CARD, "v1", 60.0)
    await anext(pieces)
    await pieces.aclose()
    assert metrics.abandoned_requests.tags == [{"model": "tiny", "stage": "model"}]


async def test_a_client_that_leaves_before_the_first_piece_is_counted_once() -> None:
    metrics, tiers = Metrics(), Tiers()
    tiers.tokenize.go.clear()
    path = path_to(Model(["hang"], ["hang"]), tiers, metrics=metrics)
    for work in (anext(path.stream(request(), CARD, "v1", 60.0)), path.answer(request("one", "two"), CARD, "v1", 60.0)):
        working = asyncio.ensure_future(work)  # type: ignore[arg-type]
        await tiers.tokenize.called.wait()
        tiers.tokenize.called.clear()
        working.cancel()
        await asyncio.wait((working,))
    assert metrics.abandoned_requests.tags == [{"model": "tiny", "stage": "tokenize"}] * 2


async def test_a_stream_that_is_complete_is_not_counted() -> None:
    metrics = Metrics()
    pieces = path_to(Model(ANSWER), metrics=metrics).stream(request(), CARD, "v1", 60.0)
    while (await anext(pieces)).finish_reason is None:
        pass
    await pieces.aclose()
    assert metrics.abandoned_requests.values == []

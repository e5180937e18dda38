"""One model whose replicas change while it is asked: an answer is of one version, from its card to its rows."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from serve_app.config import IngressSettings
from serve_app.errors import (
    BatchTooLargeError,
    ModelFailureError,
    ModelNotFoundError,
    OverloadedError,
    ServeAppError,
    UnavailableError,
    VersionGoneError,
)
from serve_app.ingress import served_model
from serve_app.ingress.finishing import Finishing
from serve_app.ingress.served_model import VERSION_TRIES, ModelTiers, ServedModel
from serve_app.ingress.tier import Tier, TierView
from serve_app.metrics import IngressMetrics
from serve_app.options import EmbeddingOptions, GenerationOptions, TokenEmbeddingOptions
from serve_app.outputs import GeneratedPiece
from serve_app.types import (
    Answer,
    FloatArray,
    GenerationDefaults,
    ModelCard,
    ModelState,
    Request,
    Usage,
    Version,
)
from tests.ingress import tiers
from tests.ingress.edge import CARD, STATE
from tests.ingress.test_coalescer import replica, settle
from tests.ingress.tiers import Recorder, expected_rows, replica_id

__all__ = ["replica"]

A, B, C, D = (Version(name, f"revision-of-{name}") for name in "abcd")


class Replicas:
    """A handle to replicas of several versions: a call gets to those of its version, as the router sends it."""

    def __init__(self, told_by_replicas: bool) -> None:
        """`told_by_replicas`: a call for a version that is not there is refused by a replica, and not by the router."""
        self.view = TierView()
        self.tier = Tier(self, self.view)
        self.calls: list[tuple[str, Any]] = []
        self.called: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.go: dict[str, asyncio.Event] = {}
        self.failures: dict[str, list[BaseException]] = defaultdict(list)
        self._told_by_replicas = told_by_replicas

    def run(self, *versions: Version) -> None:
        self.view.update({replica_id(version.fingerprint): version for version in versions})

    def hold(self, method: str) -> None:
        """Answer no call of that method until `release`."""
        self.go[method] = asyncio.Event()

    def release(self, method: str) -> None:
        self.go.pop(method).set()

    def asked(self, method: str) -> list[str]:
        """The version of each call of that method."""
        return [call.version for name, call in self.calls if name == method]

    def options(self, *, stream: bool) -> Replicas:
        assert stream
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    async def admit(self, name: str, call: Any) -> Version:
        found = [version for version in self.view.versions if version.fingerprint == call.version]
        if not found:
            gone = VersionGoneError(f"version {call.version} is gone")
            raise RayTaskError(name, "traceback", gone).as_instanceof_cause() if self._told_by_replicas else gone
        if name in self.go:
            await self.go[name].wait()
        if self.failures[name]:
            raise self.failures[name].pop(0)
        return found[0]


class Method:
    def __init__(self, replicas: Replicas, name: str) -> None:
        self._replicas, self._name = replicas, name

    def remote(self, call: Any) -> Any:
        self._replicas.calls.append((self._name, call))
        self._replicas.called[self._name].set()
        if self._name == "stream":
            return Response(self._pieces(call))
        return asyncio.ensure_future(self._answered(call))

    async def _answered(self, call: Any) -> Any:
        version = await self._replicas.admit(self._name, call)
        return ANSWERS[self._name](version, call)

    async def _pieces(self, call: Any) -> AsyncIterator[list[GeneratedPiece]]:
        version = await self._replicas.admit(self._name, call)
        yield [GeneratedPiece(f"{version.fingerprint} says", 1)]
        await self._replicas.admit("go on", call)
        yield [GeneratedPiece(" so", 2, finish_reason="stop")]


class Response:
    """What a handle gives for a streaming call."""

    def __init__(self, pieces: Any) -> None:
        self._pieces = pieces

    async def __anext__(self) -> Any:
        return await anext(self._pieces)

    def cancel(self) -> None:
        pass


def card_of(version: Version) -> ModelCard:
    return replace(CARD, revision=version.revision, prompts={"query": f"{version.revision}: "})


def definition_of(version: Version) -> str:
    """A vocabulary of one word."""
    tokenizer = Tokenizer(WordLevel({f"word-of-{version.fingerprint}": 0}, unk_token="?")).to_str()
    ids = {"unknown_id": None, "pad_id": None, "mask_id": None}
    return json.dumps({"tokenizer": tokenizer, "clean_up": False, "model_ids": None, **ids})


def tokenize(call: Any) -> Any:
    prompted = (replace(one, inputs=tuple(f"{one.prompt}{text}" for text in one.inputs)) for one in call.requests)
    return tiers.tokenize(replace(call, requests=tuple(prompted)))


def forward(version: Version, call: Any) -> Any:
    rows = tiers.forward(call)
    return replace(rows, values=rows.values + SHIFT[version])


def state_of(version: Version) -> ModelState:
    return replace(STATE, dtype=version.fingerprint)


SHIFT = {A: 1000.0, B: 2000.0, C: 3000.0, D: 4000.0}
ANSWERS: dict[str, Any] = {
    "tokenize": lambda version, call: tokenize(call),
    "forward": forward,
    "card": lambda version, call: card_of(version),
    "definition": lambda version, call: definition_of(version),
    "describe": lambda version, call: state_of(version),
    "memory_summary": lambda version, call: version.revision,
}


class Bench:
    """A model between stand-ins."""

    def __init__(self, told_by_replicas: bool = False, **settings: Any) -> None:
        self.tokenizer, self.model = Replicas(told_by_replicas), Replicas(told_by_replicas)
        self.metrics = IngressMetrics(*(Recorder() for _ in range(7)))  # type: ignore[arg-type]
        both = ModelTiers(self.tokenizer.tier, self.model.tier)
        self.served = ServedModel("tiny", both, IngressSettings(**settings), self.metrics, Finishing())

    def run(self, *versions: Version) -> None:
        """These are the versions of both tiers from now on."""
        self.tokenizer.run(*versions)
        self.model.run(*versions)

    def start(self, text: str = "hello", timeout_s: float | None = None) -> asyncio.Task[Answer]:
        options = EmbeddingOptions(prompt_name="query", normalize=False)
        request = Request("id", "tiny", "embedding", (text,), options, timeout_s=timeout_s)
        return asyncio.create_task(self.served.answer(request))


@pytest.fixture(params=[False, True], ids=["told by the router", "told by a replica"])
async def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def rows(version: Version, text: str = "hello") -> FloatArray:
    """What a request of that text and with a prompt gets, where all of it is of that version."""
    return expected_rows((f"{version.revision}: {text}",)) + SHIFT[version]


def assert_of(answer: Answer, version: Version, text: str = "hello") -> None:
    assert answer.version == version
    np.testing.assert_array_equal(answer.output, rows(version, text))  # type: ignore[arg-type]
    assert answer.tokens == len(f"{version.revision}: {text}")


@pytest.mark.parametrize(("tier", "method"), [("tokenizer", "card"), ("tokenizer", "tokenize")])
async def test_a_request_whose_version_leaves_before_its_forward_is_done_again_with_another(
    bench: Bench, tier: str, method: str
) -> None:
    bench.run(A)
    replicas = getattr(bench, tier)
    replicas.hold(method)
    asked = bench.start()
    await replicas.called[method].wait()
    bench.run(B)
    replicas.release(method)
    assert_of(await asked, B)
    assert bench.model.asked("forward")[-1] == "b"
    assert bench.metrics.retries.values == [], "no replica was lost"  # type: ignore[attr-defined]


async def test_a_version_that_goes_with_its_lost_replica_is_replaced_too(bench: Bench) -> None:
    bench.run(A)
    bench.model.hold("forward")
    asked = bench.start()
    await bench.model.called["forward"].wait()
    await settle()
    bench.model.failures["forward"] = [ActorDiedError()]
    bench.run(B)
    bench.model.release("forward")
    assert_of(await asked, B)
    assert bench.tokenizer.asked("tokenize") == ["a", "a", "b"], "once more with the version that it began with"
    assert bench.model.asked("forward") == ["a", "b"]


@pytest.mark.parametrize("asks", ["embedding", "answer", "stream"])
@pytest.mark.parametrize("tier", ["tokenizer", "model"])
async def test_a_request_that_kills_the_only_replica_of_version_after_version_kills_two(
    bench: Bench, tier: str, asks: str, request: pytest.FixtureRequest
) -> None:
    if asks != "embedding":
        request.getfixturevalue("_generates")
    replicas = getattr(bench, tier)
    method = "tokenize" if tier == "tokenizer" else "forward" if asks == "embedding" else "stream"
    bench.run(A)
    replicas.hold(method)
    asked = {
        "embedding": bench.start,
        "answer": lambda: asyncio.create_task(bench.served.answer(streaming())),
        "stream": lambda: asyncio.create_task(streamed(bench, streaming())),
    }[asks]()
    for next_version in (B, C):
        await asyncio.wait_for(replicas.called[method].wait(), 5)
        replicas.called[method].clear()
        held = replicas.go[method]
        await settle()
        replicas.failures[method] = [ActorDiedError()]
        bench.run(next_version)
        replicas.hold(method)
        held.set()
        await settle()
    with pytest.raises(UnavailableError, match="not sent a third time"):
        await asyncio.wait_for(asked, 5)
    assert "c" not in replicas.asked(method)


@pytest.mark.parametrize("lost", [ActorDiedError(), UnavailableError("ending")], ids=["died", "ending"])
async def test_what_a_lost_replica_was_asked_another_one_tells(bench: Bench, lost: Exception) -> None:
    bench.run(A)
    bench.tokenizer.failures["card"] = [lost]
    assert await bench.served.card() == card_of(A)
    bench.model.failures["memory_summary"] = [lost]
    assert await bench.served.memory() == A.revision
    bench.model.failures["memory_summary"] = [lost, lost]
    with pytest.raises(UnavailableError):
        await bench.served.memory()


async def test_a_client_that_leaves_in_the_moment_of_an_event_has_left() -> None:
    """`asyncio.wait_for` loses such a cancellation up to Python 3.11."""
    for turns in range(6):
        bench = Bench()
        bench.tokenizer.hold("card")
        asked = bench.start()
        await settle()
        bench.run(A)
        for _ in range(turns):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait((asked,), timeout=5)
        assert asked.cancelled(), turns


async def test_a_request_begins_with_the_version_whose_replicas_have_the_least_to_do() -> None:
    bench = Bench()
    bench.run(A, B)
    for busy, other in (("a", B), ("b", A)):
        bench.model.view.sent(replica_id(busy), "", 10_000)
        assert_of(await bench.start(), other)
        bench.model.view.ended(replica_id(busy), "", 10_000)


async def test_a_request_is_given_up_after_versions_left_it_again_and_again(bench: Bench) -> None:
    bench.run(A)
    bench.tokenizer.hold("tokenize")
    asked = bench.start()
    for version in (B, C, D)[:VERSION_TRIES]:
        await bench.tokenizer.called["tokenize"].wait()
        bench.tokenizer.called["tokenize"].clear()
        held = bench.tokenizer.go["tokenize"]
        bench.run(version)
        bench.tokenizer.hold("tokenize")
        held.set()
    with pytest.raises(VersionGoneError):
        await asyncio.wait_for(asked, 5)
    assert bench.tokenizer.asked("tokenize") == ["a", "b", "c"]


async def test_requests_of_two_versions_that_wait_together_share_no_call() -> None:
    bench = Bench(max_concurrent_batches=1)
    bench.run(A, B)
    bench.tokenizer.hold("tokenize")
    held = bench.start("held")
    await bench.tokenizer.called["tokenize"].wait()
    tasks: list[tuple[Version, asyncio.Task[Answer]]] = []
    for i in range(10):
        busy, mine = (("a", B), ("b", A))[i % 2]
        bench.model.view.sent(replica_id(busy), "", 100)
        tasks.append((mine, bench.start(f"text {i}")))
        await settle()
        bench.model.view.ended(replica_id(busy), "", 100)
    bench.tokenizer.release("tokenize")
    for i, (version, task) in enumerate(tasks):
        assert_of(await task, version, f"text {i}")
    await held
    calls = [call for name, call in bench.tokenizer.calls if name == "tokenize"]
    assert sorted((call.version, len(call.requests)) for call in calls[1:]) == [("a", 5), ("b", 5)]
    assert sorted(bench.model.asked("forward")[1:]) == ["a", "b"]


@pytest.mark.parametrize("before", [((), ()), ((A,), ()), ((), (A,)), ((A,), (B,))], ids=str)
async def test_a_request_waits_until_both_tiers_have_a_version(before: tuple[Any, Any]) -> None:
    bench = Bench()
    bench.tokenizer.run(*before[0])
    bench.model.run(*before[1])
    assert not bench.served.has_version
    asked = bench.start()
    await settle()
    assert not asked.done()
    bench.run(C)
    assert_of(await asyncio.wait_for(asked, 5), C)
    assert bench.served.has_version


async def test_a_request_that_waits_in_vain_is_told_when_its_time_is_up() -> None:
    bench = Bench()
    with pytest.raises(UnavailableError, match="model tiny is starting") as caught:
        await asyncio.wait_for(bench.start(timeout_s=0.05), 10)
    assert caught.value.retry_after_s == 1.0


async def test_requests_that_wait_are_told_when_the_model_is_removed() -> None:
    bench = Bench()
    asked = [bench.start() for _ in range(3)]
    await settle()
    bench.served.remove()
    for outcome in await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5):
        assert isinstance(outcome, ModelNotFoundError)


async def test_requests_under_way_are_answered_while_the_model_is_removed() -> None:
    bench = Bench()
    bench.run(A)
    bench.tokenizer.hold("tokenize")
    asked = bench.start()
    await bench.tokenizer.called["tokenize"].wait()
    bench.served.remove()
    bench.tokenizer.release("tokenize")
    assert_of(await asked, A)


async def test_what_is_known_of_a_version_is_asked_once_and_used_for_no_other(bench: Bench) -> None:
    for version in (A, A, B, B):
        bench.run(version)
        assert (await bench.served.card()).revision == version.revision
        assert await bench.served.decode([(0,)], True, Usage()) == [f"word-of-{version.fingerprint}"]
        assert_of(await bench.start(), version)
    assert bench.tokenizer.asked("card") == bench.tokenizer.asked("definition") == ["a", "b"]


async def test_what_was_known_of_a_version_that_is_gone_is_forgotten(bench: Bench) -> None:
    for version in (A, B, A):
        bench.run(version)
        await bench.served.card()
    assert bench.tokenizer.asked("card") == ["a", "b", "a"]


@pytest.mark.parametrize("held", ["card", "definition"])
async def test_what_is_asked_while_its_version_leaves_is_told_by_the_next(bench: Bench, held: str) -> None:
    bench.run(A)
    if held == "definition":
        bench.tokenizer.hold("definition")
        asked = asyncio.create_task(bench.served.decode([(0,)], True, Usage()))
        await bench.tokenizer.called["definition"].wait()
        bench.tokenizer.release("definition")
        assert await asked == ["word-of-a"], "which the replica that was asked still tells"
    bench.run(B)
    assert await bench.served.decode([(0,)], True, Usage()) == ["word-of-b"]
    assert (await bench.served.card()).revision == B.revision


async def test_information_and_memory_are_those_of_a_version_that_answers(bench: Bench) -> None:
    for version in (A, B):
        bench.run(version)
        info = await bench.served.info()
        assert (info.version, info.card, info.state) == (version, card_of(version), state_of(version))
        assert await bench.served.memory() == version.revision


async def test_readiness_is_shown_by_a_version_that_answers(bench: Bench) -> None:
    bench.run(A)
    bench.tokenizer.hold("tokenize")
    ready = asyncio.create_task(bench.served.ready())
    await bench.tokenizer.called["tokenize"].wait()
    bench.run(B)
    bench.tokenizer.release("tokenize")
    await asyncio.wait_for(ready, 5)
    assert bench.model.asked("forward")[-1] == "b"


@pytest.mark.parametrize("task", ["embedding", "text-generation"])
async def test_all_who_ask_for_readiness_share_one_probe_whoever_leaves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setitem(ANSWERS, "card", lambda version, call: replace(card_of(version), task=task))
    bench.run(A)
    bench.tokenizer.hold("tokenize")
    asking = [asyncio.create_task(bench.served.ready()) for _ in range(30)]
    await bench.tokenizer.called["tokenize"].wait()
    asking.pop(0).cancel()
    await settle()
    bench.tokenizer.release("tokenize")
    await asyncio.wait_for(asyncio.gather(*asking), 5)
    assert bench.tokenizer.asked("tokenize") == ["a"]
    assert [name for name, _ in bench.model.calls] == [{"embedding": "forward", "text-generation": "stream"}[task]]
    await bench.served.ready()
    assert len(bench.model.calls) == 1, "it has answered lately"


async def test_a_model_that_fails_its_probe_is_not_asked_again_at_once() -> None:
    bench = Bench()
    bench.run(A)
    bench.model.failures["forward"] = [ModelFailureError("not a number")] * 2
    for _ in range(10):
        with pytest.raises(UnavailableError, match="does not answer: not a number") as refused:
            await bench.served.ready()
        assert refused.value.retry_after_s == 1.0
    assert bench.model.asked("forward") == ["a"]


async def test_those_who_ask_for_information_at_once_share_one_call(bench: Bench) -> None:
    bench.run(A)
    bench.model.hold("describe")
    bench.model.hold("memory_summary")
    infos = [asyncio.create_task(bench.served.info()) for _ in range(10)]
    memories = [asyncio.create_task(bench.served.memory()) for _ in range(10)]
    await settle()
    bench.model.release("describe")
    bench.model.release("memory_summary")
    assert {info.state for info in await asyncio.gather(*infos) if info.state is None} == set()
    assert set(await asyncio.gather(*memories)) == {A.revision}
    assert sorted(name for name, _ in bench.model.calls) == ["describe", "memory_summary"]


@pytest.fixture
def _generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ANSWERS, "card", lambda version, call: replace(card_of(version), task="text-generation"))


def streaming(echo: bool = False, timeout_s: float | None = None) -> Request:
    options = GenerationOptions(max_new_tokens=3, echo=echo)
    return Request("id", "tiny", "text-generation", ((0,),), options, timeout_s=timeout_s)


async def streamed(bench: Bench, request: Request) -> list[tuple[str, str]]:
    """(text, revision) of each piece."""
    async with aclosing(bench.served.stream(request)) as pieces:
        return [(piece.text, piece.revision) async for piece in pieces]


@pytest.mark.usefixtures("_generates")
async def test_a_stream_tells_its_revision_in_the_first_piece(bench: Bench) -> None:
    bench.run(A)
    assert await streamed(bench, streaming()) == [("a says", A.revision), (" so", "")]
    assert await streamed(bench, streaming(echo=True)) == [("word-of-a", A.revision), ("a says", ""), (" so", "")]


@pytest.mark.usefixtures("_generates")
@pytest.mark.parametrize("method", ["card", "tokenize"])
async def test_a_stream_whose_version_leaves_before_its_first_piece_begins_again_with_another(
    bench: Bench, method: str
) -> None:
    bench.run(A)
    bench.tokenizer.hold(method)
    asked = asyncio.create_task(streamed(bench, streaming()))
    await bench.tokenizer.called[method].wait()
    bench.run(B)
    bench.tokenizer.release(method)
    assert await asked == [("b says", B.revision), (" so", "")]


@pytest.mark.usefixtures("_generates")
async def test_a_stream_whose_version_leaves_midway_ends_and_does_not_go_on_with_another(bench: Bench) -> None:
    bench.run(A)
    pieces = bench.served.stream(streaming())
    assert (await anext(pieces)).text == "a says"
    bench.run(B)
    with pytest.raises(VersionGoneError):
        await anext(pieces)
    assert bench.model.asked("stream") == ["a"]


@pytest.mark.usefixtures("_generates")
async def test_a_stream_waits_for_a_version_and_is_told_when_its_time_is_up_or_the_model_removed() -> None:
    bench = Bench()
    asked = asyncio.create_task(streamed(bench, streaming()))
    await settle()
    bench.run(A)
    assert (await asyncio.wait_for(asked, 5))[0] == ("a says", A.revision)
    bench.run()
    with pytest.raises(UnavailableError, match="is starting"):
        await asyncio.wait_for(streamed(bench, streaming(timeout_s=0.05)), 10)
    asked = asyncio.create_task(streamed(bench, streaming()))
    await settle()
    bench.served.remove()
    with pytest.raises(ModelNotFoundError):
        await asyncio.wait_for(asked, 5)


@pytest.mark.usefixtures("_generates")
async def test_a_whole_answer_of_a_version_that_leaves_is_made_again_by_another(bench: Bench) -> None:
    bench.run(A)
    bench.tokenizer.hold("tokenize")
    asked = asyncio.create_task(bench.served.answer(streaming(echo=True)))
    await bench.tokenizer.called["tokenize"].wait()
    bench.run(B)
    bench.tokenizer.release("tokenize")
    answer = await asked
    assert answer.version == B
    assert [whole.text for whole in answer.output] == ["word-of-bb says so"]  # type: ignore[union-attr]


def embedding(*texts: str) -> Request:
    return Request("id", "tiny", "embedding", texts, EmbeddingOptions(normalize=False))


def cost(request: Request) -> tuple[int, bool]:
    return request.usage.tokens, request.usage.is_uncertain


async def test_what_was_computed_is_told_though_the_answer_is_refused() -> None:
    bench = Bench(max_answer_bytes=3000)
    bench.run(A)
    request = Request("id", "tiny", "token-embedding", ("a",) * 100, TokenEmbeddingOptions())
    with pytest.raises(BatchTooLargeError):
        await bench.served.answer(request)
    assert bench.model.asked("forward") == ["a"]
    assert cost(request) == (100, False)


@pytest.mark.parametrize(
    ("failure", "uncertain"), [(ModelFailureError("not a number"), True), (OverloadedError("full"), False)]
)
async def test_a_failure_leaves_it_open_what_was_computed_and_a_refusal_does_not(
    bench: Bench, failure: ServeAppError, uncertain: bool
) -> None:
    bench.run(A)
    bench.model.failures["forward"] = [failure]
    request = embedding("hello")
    with pytest.raises(type(failure)):
        await bench.served.answer(request)
    assert cost(request) == (0, uncertain)


async def test_what_waits_for_a_version_or_a_place_has_cost_nothing() -> None:
    bench = Bench(max_queued_tokens=10)
    waiting = embedding("hello")
    asked = asyncio.create_task(bench.served.answer(waiting))
    await settle()
    asked.cancel()
    await settle()
    bench.run(A)
    bench.tokenizer.hold("tokenize")
    held = asyncio.create_task(bench.served.answer(embedding("x" * 40)))
    await bench.tokenizer.called["tokenize"].wait()
    refused = embedding("x" * 40)
    with pytest.raises(OverloadedError):
        await bench.served.answer(refused)
    assert cost(waiting) == cost(refused) == (0, False)
    bench.tokenizer.release("tokenize")
    await held


@pytest.mark.usefixtures("_generates")
async def test_generated_tokens_are_told_as_they_come(bench: Bench) -> None:
    """The stand-in for a tokenizer makes a token of each character: `(0,)` has four, `(0, 0)` has six."""
    bench.run(A)
    request = streaming()
    async with aclosing(bench.served.stream(request)) as pieces:
        await anext(pieces)
        assert cost(request) == (4 + 1, False)
    assert cost(request) == (4 + 1, False), "the client left"
    whole = replace(streaming(), inputs=((0,), (0, 0)), usage=Usage())
    await bench.served.answer(whole)
    assert cost(whole) == ((4 + 2) + (6 + 2), False)


@pytest.mark.usefixtures("_generates")
async def test_tokens_of_each_beam_are_told(bench: Bench) -> None:
    bench.run(A)
    options = GenerationOptions(max_new_tokens=3, num_beams=4)
    request = Request("id", "tiny", "text-generation", ((0,),), options)
    await bench.served.answer(request)
    assert cost(request) == (4 + 4 * 2, False)


@pytest.mark.usefixtures("_generates")
async def test_answers_to_the_other_prompts_of_a_refused_request_are_told(bench: Bench) -> None:
    bench.run(A)
    bench.model.failures["go on"] = [OverloadedError("full")] * 3
    request = replace(streaming(), inputs=((0,),) * 3, usage=Usage())
    with pytest.raises(OverloadedError):
        await bench.served.answer(request)
    assert cost(request) == (3 * (4 + 1), False)


async def test_texts_whose_tokens_are_too_many_to_be_told_have_cost_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BatchTooLargeError("too many")

    monkeypatch.setattr(served_model, "text_tokens", refuse)
    bench.run(A)
    usage = Usage()
    with pytest.raises(BatchTooLargeError):
        await bench.served.tokenize(["hello", "you"], True, None, usage)
    assert usage.tokens == len("helloyou")


async def test_texts_of_tokens_cost_the_tokens_that_are_read(bench: Bench) -> None:
    bench.run(A)
    usage = Usage()
    await bench.served.decode([(0, 0), (0,)], True, usage)
    assert usage.tokens == 3


@pytest.mark.parametrize(
    ("options", "defaults", "tokens"),
    [
        (GenerationOptions(), GenerationDefaults(), 2 * (2 + 62)),
        (GenerationOptions(), GenerationDefaults(max_new_tokens=10), 2 * (2 + 10)),
        (GenerationOptions(), GenerationDefaults(max_length=20), 2 * (2 + 18)),
        (GenerationOptions(), GenerationDefaults(max_new_tokens=10, num_beams=4), 2 * (2 + 40)),
        (GenerationOptions(max_length=7), GenerationDefaults(max_length=20), 2 * (2 + 5)),
        (GenerationOptions(max_new_tokens=5, num_beams=2), GenerationDefaults(max_new_tokens=10), 2 * (2 + 10)),
        (GenerationOptions(max_new_tokens=10**9), GenerationDefaults(), 2 * (2 + 62)),
    ],
    ids=["window", "new", "length", "beams", "own length", "own", "more than fits"],
)
async def test_an_answer_is_estimated_as_long_as_request_and_model_allow(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, options: GenerationOptions, defaults: GenerationDefaults, tokens: int
) -> None:
    """Two prompts of two tokens, in a window of 64."""
    card = replace(CARD, task="text-generation", generation=defaults)
    monkeypatch.setitem(ANSWERS, "card", lambda version, call: card)
    bench.run(A)
    request = Request("id", "tiny", "text-generation", ((5, 6), (7, 8)), options)
    assert await bench.served.estimate(request) == tokens

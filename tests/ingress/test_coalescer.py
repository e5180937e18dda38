"""Concurrent requests share one call to each tier, through Ray Serve's own `@serve.batch`."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from serve_app.config import IngressSettings
from serve_app.errors import (
    InputTooLongError,
    ModelFailureError,
    OverloadedError,
    ServeAppError,
    UnavailableError,
    VersionGoneError,
)
from serve_app.ingress import shared_call
from serve_app.ingress.coalescer import Coalescer, Computed, Work
from serve_app.ingress.router import CallNotUnderWayError
from serve_app.ingress.statuses import kind_of
from serve_app.metrics import IngressMetrics
from serve_app.types import Forget, Rows, TokenizeCall, TokenizeRequest
from tests.ingress.tiers import Recorder, Tiers, expected_rows, forward, ids
from tests.inprocess import in_a_replica


@pytest.fixture(autouse=True, scope="module")
def replica() -> Iterator[None]:
    """`@serve.batch` asks the replica that it runs in how many requests may be under way."""
    with in_a_replica():
        yield


class Bench:
    """A coalescer between stand-ins."""

    def __init__(self, **limits: int) -> None:
        self.tiers = Tiers()
        self.metrics = IngressMetrics(*(Recorder() for _ in range(7)))  # type: ignore[arg-type]
        settings = IngressSettings.model_validate({"max_concurrent_batches": 1, **limits})
        self.coalescer = Coalescer("tiny", self.tiers.tier, self.tiers.tier, settings, self.metrics)

    async def compute(
        self, *inputs: str, head: str = "pooled", version: str = "v1", timeout_s: float = 60.0
    ) -> Computed:
        return await self.coalescer.compute(Work(TokenizeRequest(inputs, "truncate"), head, version), timeout_s)

    def start(self, *inputs: str) -> asyncio.Task[Computed]:
        return asyncio.create_task(self.compute(*inputs))

    async def hold_one(self) -> asyncio.Task[Computed]:
        """A request that occupies the only batch until `release`, so that what comes now waits for the next."""
        self.tiers.tokenize.go.clear()
        self.tiers.tokenize.called.clear()
        held = self.start("held")
        await self.tiers.tokenize.called.wait()
        return held

    def release(self) -> None:
        self.tiers.tokenize.go.set()

    @property
    def batches(self) -> list[int]:
        """Requests in each call to the tokenizer."""
        return [len(call.requests) for call in self.tiers.tokenize.calls]

    @property
    def retries(self) -> list[float]:
        return self.metrics.retries.values  # type: ignore[attr-defined,no-any-return]

    @property
    def abandoned(self) -> list[str]:
        """The stage of each request that was abandoned."""
        return [tags["stage"] for tags in self.metrics.abandoned_requests.tags]  # type: ignore[attr-defined]


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def assert_rows(computed: Computed, *inputs: str) -> None:
    np.testing.assert_array_equal(computed.features.values, expected_rows(inputs))
    assert computed.tokens == sum(len(text) for text in inputs)


async def test_requests_that_came_while_a_batch_was_under_way_share_one_call_to_each_tier(bench: Bench) -> None:
    held = await bench.hold_one()
    waiting = [bench.start(f"text {i}", "x" * i) for i in range(50)]
    await settle()
    assert bench.batches == [1]
    bench.release()
    for i, computed in enumerate(await asyncio.gather(*waiting)):
        assert_rows(computed, f"text {i}", "x" * i)
    assert_rows(await held, "held")
    assert bench.batches == [1, 50]
    assert [call.tokens.num_requests for call in bench.tiers.forward.calls] == [1, 50]
    assert bench.metrics.coalesced_requests.values == [1, 50]  # type: ignore[attr-defined]


async def test_requests_of_one_moment_share_a_call(bench: Bench) -> None:
    await asyncio.gather(*(bench.compute(f"text {i}") for i in range(30)))
    assert bench.batches == [30]


async def test_requests_of_one_moment_make_a_batch_for_each_free_slot() -> None:
    """`@serve.batch` alone would take them all into one, and leave all replicas but one idle."""
    bench = Bench(max_concurrent_batches=4)
    bench.tiers.forward.go.clear()
    tasks = [bench.start("text") for _ in range(32)]
    await settle()
    await settle()
    assert len(bench.tiers.forward.calls) == 4
    bench.tiers.forward.go.set()
    await asyncio.gather(*tasks)
    assert sum(bench.batches) == 32


async def test_an_idle_ingress_waits_for_nothing_but_the_tiers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    waits: list[float] = []
    at = loop.call_at

    def call_at(when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        waits.append(when - loop.time())
        return at(when, *args, **kwargs)

    monkeypatch.setattr(loop, "call_at", call_at)
    for _ in range(3):
        await bench.compute("alone")
    assert bench.batches == [1, 1, 1]
    assert [wait for wait in waits if 0 < wait < shared_call.PULSE_S / 2] == []


async def test_limits_close_a_batch_and_can_be_changed_while_running() -> None:
    bench = Bench(max_batch_requests=4)
    held = await bench.hold_one()
    first = [bench.start("text") for _ in range(10)]
    await settle()
    bench.release()
    await asyncio.gather(held, *first)
    assert bench.batches == [1, 4, 4, 2]
    bench.coalescer.reconfigure(IngressSettings(max_concurrent_batches=1, max_batch_characters=8))
    held = await bench.hold_one()
    second = [bench.start("text") for _ in range(5)]
    await settle()
    bench.release()
    await asyncio.gather(held, *second)
    assert bench.batches[4:] == [1, 2, 2, 1]


async def test_what_one_request_costs_is_told(bench: Bench) -> None:
    computed, other = await asyncio.gather(bench.compute("two", "cut!"), bench.compute("other"))
    assert (computed.tokens, computed.truncated, other.truncated) == (7, 1, 0)
    assert (computed.timings.tokenize_s, other.timings.tokenize_s) == (0.5, 0.5)
    assert (other.timings.queue_s, other.timings.forward_s) == (1.0, 10.0)


async def test_the_model_is_told_how_long_each_request_may_still_take(bench: Bench) -> None:
    await asyncio.gather(bench.compute("a", timeout_s=5), bench.compute("b", timeout_s=500))
    short, long = bench.tiers.forward.calls[0].time_left_s
    assert short is not None
    assert long is not None
    assert 0 < short <= 5 < long <= 500


async def test_each_head_has_its_own_call_and_each_request_its_own_rows(bench: Bench) -> None:
    one, two, three = await asyncio.gather(
        bench.compute("a", head="pooled"), bench.compute("b", head="other head"), bench.compute("c", head="pooled")
    )
    assert sorted((call.head, call.tokens.num_requests) for call in bench.tiers.forward.calls) == [
        ("other head", 1),
        ("pooled", 2),
    ]
    np.testing.assert_array_equal(two.features.values, expected_rows(("b",), "other head"))
    assert_rows(one, "a")
    assert_rows(three, "c")


async def test_each_version_has_its_own_calls_to_both_tiers(bench: Bench) -> None:
    versions = ["v1", "v2", "v1", "v2", "v2"]
    asked = [bench.compute(f"text {i}", version=version) for i, version in enumerate(versions)]
    for i, computed in enumerate(await asyncio.gather(*asked)):
        assert_rows(computed, f"text {i}")
    assert sorted((call.version, len(call.requests)) for call in bench.tiers.tokenize.calls) == [("v1", 2), ("v2", 3)]
    assert sorted((call.version, call.tokens.num_requests) for call in bench.tiers.forward.calls) == [
        ("v1", 2),
        ("v2", 3),
    ]


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
async def test_a_version_that_is_gone_is_told_and_not_tried_again(bench: Bench, tier: str) -> None:
    getattr(bench.tiers, tier).failures = [VersionGoneError("gone")]
    outcomes = await asyncio.gather(*(bench.compute(f"text {i}") for i in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [VersionGoneError] * 3
    assert bench.batches == [3]
    assert bench.retries == []


@pytest.mark.parametrize(("bad", "error"), [("bad", InputTooLongError), ("poison", ModelFailureError)])
async def test_a_request_that_fails_leaves_its_neighbours_alone(
    bench: Bench, bad: str, error: type[ServeAppError]
) -> None:
    texts = ["first", bad, "second", bad, "third"]
    outcomes = await asyncio.gather(*(bench.compute(text) for text in texts), return_exceptions=True)
    for text, outcome in zip(texts, outcomes, strict=True):
        if text == bad:
            assert isinstance(outcome, error)
        else:
            assert isinstance(outcome, Computed)
            assert_rows(outcome, text)
    assert bench.batches == [5]
    assert bench.retries == []


async def test_the_model_is_not_asked_where_no_request_can_be_tokenized(bench: Bench) -> None:
    outcomes = await asyncio.gather(bench.compute("bad 1"), bench.compute("bad 2"), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["bad 1 is too long", "bad 2 is too long"]
    assert bench.tiers.forward.calls == []


LOST = [
    ActorDiedError(),
    ActorUnavailableError("gone", None),
    ReplicaUnavailableError("gone"),
    ConnectionResetError("gone"),
    UnavailableError("draining"),
]


def names(error: BaseException) -> str:
    return type(error).__name__


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
@pytest.mark.parametrize("lost", LOST, ids=names)
async def test_what_a_replica_took_with_it_goes_again_each_by_itself(bench: Bench, tier: str, lost: Exception) -> None:
    getattr(bench.tiers, tier).failures = [lost]
    outcomes = await asyncio.gather(*(bench.compute(f"text {i}") for i in range(5)))
    for i, computed in enumerate(outcomes):
        assert_rows(computed, f"text {i}")
    assert bench.batches == [5, 1, 1, 1, 1, 1]
    assert bench.retries == [1] * 5


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
@pytest.mark.parametrize("lost", LOST, ids=names)
async def test_a_request_that_is_lost_twice_is_unavailable_and_not_sent_a_third_time(
    bench: Bench, tier: str, lost: Exception
) -> None:
    getattr(bench.tiers, tier).failures = [lost] * 4
    outcomes = await asyncio.gather(*(bench.compute(f"text {i}") for i in range(3)), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, UnavailableError)
        assert kind_of(outcome).status == 503
        assert "not sent a third time" in outcome.message
    assert bench.batches == [3, 1, 1, 1]
    assert_rows(await bench.compute("afterwards"), "afterwards")


class Mortal:
    """A handle to one replica after the other: each dies, with all calls that it has, when it computes `DEADLY`."""

    DEADLY = "deadly"

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.deaths = 0
        self._answer = answer
        self._under_way: set[asyncio.Future[Any]] = set()

    def remote(self, call: Any) -> asyncio.Future[Any]:
        response = asyncio.get_running_loop().create_future()
        self._under_way.add(response)
        task = asyncio.ensure_future(self._compute(call, response))
        response.add_done_callback(lambda _: task.cancel())
        return response

    async def _compute(self, call: Any, response: asyncio.Future[Any]) -> None:
        for _ in range(3):  # in which others come
            await asyncio.sleep(0)
        if self._kills(call):
            self.deaths += 1
            for each in self._under_way:
                if not each.done():
                    each.set_exception(ActorDiedError())
            self._under_way.clear()
        else:
            self._under_way.discard(response)
            response.set_result(self._answer(call))

    def _kills(self, call: Any) -> bool:
        if isinstance(call, TokenizeCall):
            return any(self.DEADLY in request.inputs for request in call.requests)
        each = (call.tokens.select(i, i + 1).input_ids.tolist() for i in range(call.tokens.num_sequences))
        return any(sequence == ids(self.DEADLY) for sequence in each)


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("batches", [1, 4])
async def test_a_request_that_kills_its_replicas_takes_one_more_with_it_and_none_of_its_neighbours(
    tier: str, place: int, batches: int
) -> None:
    bench = Bench(max_concurrent_batches=batches)
    mortal = Mortal(getattr(bench.tiers, tier)._answer)
    setattr(bench.tiers, tier, mortal)
    texts = [f"text {i}" for i in range(12)]
    texts[place] = Mortal.DEADLY
    outcomes = await asyncio.gather(*(bench.compute(text) for text in texts), return_exceptions=True)
    assert mortal.deaths == 2
    for text, outcome in zip(texts, outcomes, strict=True):
        if text == Mortal.DEADLY:
            assert isinstance(outcome, UnavailableError)
            assert "not sent a third time" in outcome.message
        else:
            assert isinstance(outcome, Computed), outcome
            assert_rows(outcome, text)


async def test_a_request_that_was_lost_with_another_version_is_not_put_together_with_others(bench: Bench) -> None:
    held = await bench.hold_one()
    work = Work(TokenizeRequest(("suspect",), "truncate"), "pooled", "v1")
    suspect = asyncio.create_task(bench.coalescer.compute(work, 60.0, {0}))
    others = [bench.start("one"), bench.start("two")]
    await settle()
    bench.release()
    assert_rows(await suspect, "suspect")
    await asyncio.gather(held, *others)
    assert sorted([request.inputs for request in call.requests] for call in bench.tiers.tokenize.calls) == [
        [("held",)],
        [("one",), ("two",)],
        [("suspect",)],
    ]


def dies_and_holds_the_next_call(bench: Bench) -> None:
    """The model replica dies of the next call, and what comes then waits."""

    def die(call: object) -> Rows:
        bench.tiers.forward.go.clear()
        raise ActorDiedError

    bench.tiers.forward.answers = [die]


async def test_a_request_whose_turn_does_not_come_in_time_goes_beside_the_others(bench: Bench) -> None:
    dies_and_holds_the_next_call(bench)
    waits, hurries = bench.start("waits"), asyncio.create_task(bench.compute("hurries", timeout_s=0.1))
    await settle()
    assert asked_of_the_model(bench) == [[5, 7], [5]]
    while len(bench.tiers.forward.calls) < 3:
        await asyncio.sleep(0.001)
    bench.tiers.forward.go.set()
    assert_rows(await waits, "waits")
    assert_rows(await hurries, "hurries")
    bench.tiers.forward.failures = [ActorDiedError()]
    assert_rows(await bench.compute("afterwards"), "afterwards")


async def test_what_goes_again_goes_before_what_waits_at_the_replica(bench: Bench) -> None:
    bench.tiers.forward.failures = [ActorDiedError()]
    await asyncio.gather(bench.compute("one"), bench.compute("two"))
    assert [call.goes_first for call in bench.tiers.forward.calls] == [False, True, True]


async def test_a_request_that_leaves_while_it_goes_again_cancels_its_call_and_lets_the_next_go(bench: Bench) -> None:
    dies_and_holds_the_next_call(bench)
    leaves, waits, stays = (bench.start(text) for text in ("leaves", "waits", "stays"))
    await settle()
    assert asked_of_the_model(bench) == [[6, 5, 5], [6]]
    await leave(waits, leaves)
    assert bench.tiers.forward.responses[1].cancelled()
    bench.tiers.forward.go.set()
    assert_rows(await stays, "stays")
    assert bench.abandoned == ["model", "model"]
    assert asked_of_the_model(bench) == [[6, 5, 5], [6], [5]]


async def test_only_what_a_replica_lost_is_sent_again(bench: Bench) -> None:
    """As where a model replica drains: what it has begun it answers, the rest it gives back."""
    bench.tiers.forward.answers = [lambda call: replace(forward(call), failures={1: UnavailableError("draining")})]
    outcomes = await asyncio.gather(bench.compute("first"), bench.compute("given back"), bench.compute("third"))
    for text, computed in zip(("first", "given back", "third"), outcomes, strict=True):
        assert_rows(computed, text)
    assert bench.batches == [3, 1]
    assert bench.retries == [1]


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
@pytest.mark.parametrize(
    "full",
    [
        BackPressureError(num_queued_requests=9, max_queued_requests=9),
        OverloadedError("queue is full", retry_after_s=2.0),
        RayTaskError("forward", "traceback", OverloadedError("queue is full")).as_instanceof_cause(),
    ],
    ids=["Serve's queue", "our queue", "our queue, told by Ray"],
)
async def test_a_full_queue_is_told_to_every_request_and_not_tried_again(
    bench: Bench, tier: str, full: Exception
) -> None:
    getattr(bench.tiers, tier).failures = [full]
    outcomes = await asyncio.gather(*(bench.compute(f"text {i}") for i in range(3)), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, OverloadedError)
        assert kind_of(outcome).status == 429
        assert outcome.message
    assert bench.batches == [3]
    assert_rows(await bench.compute("afterwards"), "afterwards")


BUG = ZeroDivisionError("a bug")


@pytest.mark.parametrize("bug", [BUG, RayTaskError("forward", "traceback", BUG).as_instanceof_cause()], ids=["", "Ray"])
@pytest.mark.parametrize("tier", ["tokenize", "forward"])
async def test_a_bug_reaches_every_caller_as_it_is_and_hangs_none(bench: Bench, tier: str, bug: Exception) -> None:
    getattr(bench.tiers, tier).failures = [bug]
    outcomes = await asyncio.gather(*(bench.compute(f"text {i}") for i in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError] * 3
    assert bench.retries == []
    assert_rows(await bench.compute("afterwards"), "afterwards")


async def test_a_request_cancelled_while_it_waits_is_not_computed(bench: Bench) -> None:
    held = await bench.hold_one()
    stays, leaves, also_stays = bench.start("stays"), bench.start("leaves"), bench.start("also stays")
    await settle()
    leaves.cancel()
    await settle()
    bench.release()
    assert_rows(await stays, "stays")
    assert_rows(await also_stays, "also stays")
    await held
    assert leaves.cancelled()
    assert [request.inputs for request in bench.tiers.tokenize.calls[1].requests] == [("stays",), ("also stays",)]


async def test_a_request_cancelled_in_a_batch_leaves_its_neighbours_alone(bench: Bench) -> None:
    bench.tiers.forward.go.clear()
    stays, leaves = bench.start("stays"), bench.start("leaves")
    await bench.tiers.forward.called.wait()
    leaves.cancel()
    await settle()
    bench.tiers.forward.go.set()
    assert_rows(await stays, "stays")
    assert leaves.cancelled()
    assert_rows(await bench.compute("afterwards"), "afterwards")


async def test_cancelled_requests_make_room_for_others() -> None:
    bench = Bench(max_batch_requests=2)
    held = await bench.hold_one()
    held.cancel()
    for _ in range(20):
        leaves = bench.start("leaves")
        await settle()
        leaves.cancel()
    bench.release()
    assert_rows(await bench.compute("afterwards"), "afterwards")


def asked_of_the_model(bench: Bench) -> list[list[int]]:
    """Tokens of each request, in each call to the model."""
    calls = [call.tokens for call in bench.tiers.forward.calls]
    return [[tokens.tokens_of(i) for i in range(tokens.num_requests)] for tokens in calls]


async def at(tier: str, bench: Bench, *texts: str) -> list[asyncio.Task[Computed]]:
    """Requests of one batch, which is held at that tier."""
    method = getattr(bench.tiers, tier)
    method.go.clear()
    tasks = [bench.start(text) for text in texts]
    await method.called.wait()
    await settle()
    return tasks


async def leave(*tasks: asyncio.Task[Computed]) -> None:
    for task in tasks:
        task.cancel()
    await settle()
    assert all(task.cancelled() for task in tasks)


async def test_a_request_that_leaves_while_it_is_tokenized_is_not_sent_to_the_model(bench: Bench) -> None:
    stays, leaves, also_stays = await at("tokenize", bench, "stays", "leaves", "also stays")
    await leave(leaves)
    bench.tiers.tokenize.go.set()
    assert_rows(await stays, "stays")
    assert_rows(await also_stays, "also stays")
    assert asked_of_the_model(bench) == [[5, 0, 10]]
    assert bench.tiers.forget.calls == []


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
async def test_a_call_that_all_have_left_is_cancelled_and_its_slot_is_free(bench: Bench, tier: str) -> None:
    tasks = await at(tier, bench, "one", "two", "three")
    await leave(*tasks[:2])
    [call] = getattr(bench.tiers, tier).responses
    assert not call.done()
    await leave(tasks[2])
    assert call.cancelled()
    assert bench.retries == []
    assert len(bench.tiers.forward.calls) == (tier == "forward")
    getattr(bench.tiers, tier).go.set()
    assert_rows(await bench.compute("afterwards"), "afterwards")


async def test_the_replica_is_told_once_of_all_that_leave_at_one_moment() -> None:
    bench = Bench(max_batch_requests=2000)
    tasks = await at("forward", bench, *(f"text {i}" for i in range(1001)))
    await leave(*tasks[:1000])
    [told] = bench.tiers.forget.calls
    assert told == Forget(bench.tiers.forward.calls[0].id, tuple(range(1000)))
    bench.tiers.forward.go.set()
    assert_rows(await tasks[1000], "text 1000")


async def test_those_that_leave_while_the_replica_is_told_are_told_together(bench: Bench) -> None:
    tasks = await at("forward", bench, *"abcdef")
    bench.tiers.forget.go.clear()
    for task in tasks[:5]:
        await leave(task)
    bench.tiers.forget.go.set()
    await settle()
    assert [told.requests for told in bench.tiers.forget.calls] == [(0,), (1, 2, 3, 4)]
    bench.tiers.forward.go.set()
    assert_rows(await tasks[5], "f")


async def test_nobody_is_told_anything_where_nobody_leaves(bench: Bench) -> None:
    await asyncio.gather(*(bench.compute(f"text {i}") for i in range(30)))
    assert bench.tiers.forget.calls == []
    assert bench.abandoned == []


async def test_a_replica_that_has_not_got_the_call_yet_is_told_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_call, "TELL_AGAIN_S", 0.0)
    stays, leaves, also_leaves = await at("forward", bench, "stays", "leaves", "also leaves")
    bench.tiers.forget.answers = [lambda told: False]
    await leave(leaves)
    await leave(also_leaves)
    told = [call.requests for call in bench.tiers.forget.calls]
    assert told[0] == (1,)
    assert set().union(*told[1:]) == {1, 2}
    bench.tiers.forward.go.set()
    assert_rows(await stays, "stays")


@pytest.mark.parametrize("lost", [*LOST[:-1], CallNotUnderWayError("ended")], ids=names)
async def test_a_replica_that_cannot_be_told_fails_nobody(bench: Bench, lost: Exception) -> None:
    stays, leaves = await at("forward", bench, "stays", "leaves")
    bench.tiers.forget.failures = [lost]
    await leave(leaves)
    bench.tiers.forward.go.set()
    assert_rows(await stays, "stays")
    assert len(bench.tiers.forget.calls) == 1


async def test_what_a_lost_replica_took_is_sent_again_without_those_that_left(bench: Bench) -> None:
    stays, leaves = await at("forward", bench, "stays", "leaves")
    bench.tiers.forward.failures = [ActorDiedError()]
    await leave(leaves)
    bench.tiers.forward.go.set()
    assert_rows(await stays, "stays")
    assert [[request.inputs for request in call.requests] for call in bench.tiers.tokenize.calls][1:] == [[("stays",)]]


async def test_what_a_lost_replica_took_is_not_sent_again_where_all_have_left(bench: Bench) -> None:
    tasks = await at("forward", bench, "one", "two")
    bench.tiers.forward.failures = [ActorDiedError()]
    bench.tiers.forward.go.set()
    await leave(*tasks)
    assert bench.batches == [2]
    assert_rows(await bench.compute("afterwards"), "afterwards")


async def test_the_replica_is_told_outside_of_the_leaving_requests_own_context(bench: Bench) -> None:
    """Serve cancels what a cancelled request's context has called."""
    asker: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="nobody")
    seen: list[str] = []

    def forgotten(told: Forget) -> bool:
        seen.append(asker.get())
        return True

    async def ask(name: str) -> Computed:
        asker.set(name)
        return await bench.compute(name)

    await bench.compute("the first, in whose context serve.batch starts its own task")
    bench.tiers.forget.answers = [forgotten]
    bench.tiers.forward.go.clear()
    bench.tiers.forward.called.clear()
    leaves, stays = asyncio.create_task(ask("leaves")), asyncio.create_task(ask("stays"))
    await bench.tiers.forward.called.wait()
    await leave(leaves)
    bench.tiers.forward.go.set()
    await stays
    assert seen == ["nobody"]


async def test_what_was_abandoned_is_counted_by_the_stage_it_had_reached(bench: Bench) -> None:
    for tier in ("tokenize", "forward"):
        leaves, stays = await at(tier, bench, "leaves", "stays")
        waits = bench.start("waits")
        await settle()
        await leave(leaves, waits)
        getattr(bench.tiers, tier).go.set()
        await stays
        bench.tiers.forward.called.clear()
    assert bench.abandoned == ["tokenize", "waiting", "model", "waiting"]


@given(
    leaving=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 30)), max_size=30),
    batches=st.integers(1, 3),
    max_requests=st.integers(1, 20),
)
@settings(max_examples=100)
def test_whoever_leaves_and_whenever_those_that_stay_get_their_own_rows(
    leaving: list[tuple[int, int]], batches: int, max_requests: int
) -> None:
    async def run() -> tuple[Bench, list[Computed | BaseException], set[int]]:
        bench = Bench(max_concurrent_batches=batches, max_batch_requests=max_requests)
        tasks = [bench.start("x" * i, f"text {i}") for i in range(20)]
        left: set[int] = set()
        for turn in range(31):
            for who, when in leaving:
                if when == turn and tasks[who].cancel():
                    left.add(who)
            await asyncio.sleep(0)
        return bench, await asyncio.gather(*tasks, return_exceptions=True), left

    bench, outcomes, left = asyncio.run(run())
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, asyncio.CancelledError):
            assert i in left
        else:
            assert isinstance(outcome, Computed), outcome
            assert_rows(outcome, "x" * i, f"text {i}")
    assert bench.coalescer._gate.waiting == 0


async def test_models_do_not_share_a_queue() -> None:
    one, other = Bench(), Bench()
    await asyncio.gather(*(bench.compute("text") for bench in (one, other) for _ in range(5)))
    assert (one.batches, other.batches) == ([5], [5])


texts = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=30)
requests = st.lists(st.lists(st.sampled_from(["bad", "poison", "cut!"]) | texts, min_size=1, max_size=5), max_size=40)


@given(
    several=requests,
    batches=st.integers(1, 4),
    max_requests=st.integers(1, 20),
    max_characters=st.integers(1, 300),
    pauses=st.lists(st.booleans(), min_size=40, max_size=40),
)
@settings(max_examples=100)
def test_every_request_gets_its_own_rows_whatever_came_with_it(
    several: list[list[str]], batches: int, max_requests: int, max_characters: int, pauses: list[bool]
) -> None:
    async def run() -> tuple[Bench, list[Computed | BaseException]]:
        limits = {"max_batch_requests": max_requests, "max_batch_characters": max_characters}
        bench = Bench(max_concurrent_batches=batches, **limits)
        started = []
        for texts, pause in zip(several, pauses, strict=False):
            started.append(bench.start(*texts))
            if pause:
                await asyncio.sleep(0)
        return bench, await asyncio.gather(*started, return_exceptions=True)

    bench, outcomes = asyncio.run(run())
    for texts, outcome in zip(several, outcomes, strict=True):
        if any(text.startswith("bad") for text in texts):
            assert isinstance(outcome, InputTooLongError)
        elif "poison" in texts:
            assert isinstance(outcome, ModelFailureError)
        else:
            assert isinstance(outcome, Computed)
            assert_rows(outcome, *texts)
            assert outcome.truncated == texts.count("cut!")
    assert sum(bench.batches) == len(several)
    assert max(bench.batches, default=0) <= max_requests

"""A replica that has a long call is asked whether it lives, and one that does not answer loses the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from serve_app.errors import UnavailableError
from serve_app.ingress import shared_call
from serve_app.ingress.router import CallNotUnderWayError
from serve_app.types import Forget, ForwardCall, Rows
from tests.ingress.test_coalescer import Bench, assert_rows, replica
from tests.ingress.tiers import forward, replica_id

__all__ = ["replica"]

REPLICA = replica_id("a")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_call, "PULSE_S", 0.001)
    monkeypatch.setattr(shared_call, "PULSE_TIMEOUT_S", 0.01)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def until(true: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not true():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 30)


def is_distrusted(bench: Bench) -> bool:
    return bench.tiers.tier.view.rank(REPLICA)[0]


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
async def test_a_replica_that_falls_silent_loses_its_call_which_is_sent_again(bench: Bench, tier: str) -> None:
    method = getattr(bench.tiers, tier)
    method.go.clear()
    bench.tiers.forget.go.clear()
    asked = bench.start("text")
    await method.called.wait()
    bench.tiers.tier.view.sent(REPLICA, method.calls[0].id, 1)  # as the router tells
    await until(lambda: bool(method.responses) and method.responses[0].cancelled())
    method.go.set()
    assert_rows(await asked, "text")
    assert bench.tiers.forget.calls[0] == Forget(method.calls[0].id, ())
    assert len(method.calls) == 2
    assert method.calls[0].id != method.calls[1].id
    assert bench.retries == [1]
    assert is_distrusted(bench)


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
async def test_replicas_that_fall_silent_twice_make_the_request_unavailable(bench: Bench, tier: str) -> None:
    method = getattr(bench.tiers, tier)
    method.go.clear()
    bench.tiers.forget.go.clear()
    with pytest.raises(UnavailableError, match="fell silent") as caught:
        await asyncio.wait_for(bench.compute("text"), 30)
    assert caught.value.retry_after_s == 1.0
    assert len(method.calls) == 2


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
async def test_a_replica_that_says_that_it_lives_keeps_its_call_however_long_it_takes(bench: Bench, tier: str) -> None:
    method = getattr(bench.tiers, tier)
    method.go.clear()
    asked = bench.start("text")
    await method.called.wait()
    bench.tiers.tier.view.sent(REPLICA, method.calls[0].id, 1)
    await until(lambda: len(bench.tiers.forget.calls) > 20)
    assert {told.requests for told in bench.tiers.forget.calls} == {()}, "about no request"
    method.go.set()
    assert_rows(await asked, "text")
    assert len(method.calls) == 1
    assert not is_distrusted(bench)


@pytest.mark.parametrize("error", [CallNotUnderWayError("no replica yet"), ActorDiedError()], ids=repr)
async def test_a_question_that_reaches_nobody_is_no_silence(bench: Bench, error: Exception) -> None:
    """The call waits for a replica, or is about to tell what became of it."""
    bench.tiers.forward.go.clear()
    bench.tiers.forget.failures = [error] * 10
    asked = bench.start("text")
    await until(lambda: len(bench.tiers.forget.calls) > 15)
    bench.tiers.forward.go.set()
    assert_rows(await asked, "text")
    assert len(bench.tiers.forward.calls) == 1


HANGS = UnavailableError("the device hangs")


@pytest.mark.parametrize("tier", ["tokenize", "forward"])
@pytest.mark.parametrize(
    "told", [HANGS, RayTaskError("forget", "traceback", HANGS).as_instanceof_cause()], ids=["as it is", "by Ray"]
)
async def test_a_replica_that_says_that_it_cannot_compute_loses_its_call_which_is_sent_again(
    bench: Bench, tier: str, told: Exception
) -> None:
    method = getattr(bench.tiers, tier)
    method.go.clear()
    bench.tiers.forget.failures = [told]
    asked = bench.start("text")
    await method.called.wait()
    bench.tiers.tier.view.sent(REPLICA, method.calls[0].id, 1)
    await until(lambda: bool(method.responses) and method.responses[0].cancelled())
    method.go.set()
    assert_rows(await asked, "text")
    assert len(method.calls) == 2
    assert bench.retries == [1]
    assert is_distrusted(bench)


@pytest.mark.parametrize("is_ended", [False, True], ids=["counted", "counted as ended"])
@pytest.mark.parametrize("told", ["raised", "of the request"])
async def test_a_replica_that_gives_a_call_back_gets_none_while_others_take_them(
    bench: Bench, told: str, is_ended: bool
) -> None:
    """Its queue is empty then, for which it would be chosen first."""

    def give_back(call: ForwardCall) -> Rows:
        bench.tiers.tier.view.sent(REPLICA, call.id, 1)
        if is_ended:
            bench.tiers.tier.view.ended(REPLICA, call.id, 1)
        if told == "raised":
            raise UnavailableError("the device hangs")
        return replace(forward(call), failures={0: UnavailableError("the device hangs")})

    bench.tiers.forward.answers = [give_back]
    assert_rows(await bench.compute("text"), "text")
    assert len(bench.tiers.forward.calls) == 2
    assert is_distrusted(bench)


async def test_a_replica_is_not_distrusted_for_what_it_forgot_as_it_was_told(bench: Bench) -> None:
    bench.tiers.forward.go.clear()
    stays, leaves = bench.start("stays"), bench.start("leaves")
    await bench.tiers.forward.called.wait()
    [call] = bench.tiers.forward.calls
    bench.tiers.tier.view.sent(REPLICA, call.id, 1)
    leaves.cancel()
    nobody_waits = UnavailableError("nobody waits for this request any more")
    bench.tiers.forward.answers = [lambda call: replace(forward(call), failures={1: nobody_waits})]
    bench.tiers.forward.go.set()
    assert_rows(await stays, "stays")
    assert not is_distrusted(bench)


async def test_a_replica_that_falls_silent_after_it_had_answered_loses_its_call(bench: Bench) -> None:
    bench.tiers.forward.go.clear()
    asked = bench.start("text")
    await until(lambda: len(bench.tiers.forget.calls) > 5)
    bench.tiers.forget.go.clear()
    await until(lambda: bench.tiers.forward.responses[0].cancelled())
    bench.tiers.forward.go.set()
    assert_rows(await asked, "text")
    assert len(bench.tiers.forward.calls) == 2


async def test_nobody_is_asked_any_more_when_the_call_has_ended(bench: Bench) -> None:
    bench.tiers.forward.go.clear()
    asked = bench.start("text")
    await until(lambda: len(bench.tiers.forget.calls) > 5)
    bench.tiers.forward.go.set()
    await asked
    questions = len(bench.tiers.forget.calls)
    await asyncio.sleep(0.05)
    assert len(bench.tiers.forget.calls) == questions


async def test_all_who_leave_a_silent_call_are_done_with_it(bench: Bench) -> None:
    bench.tiers.forward.go.clear()
    bench.tiers.forget.go.clear()
    asked = bench.start("text")
    await bench.tiers.forward.called.wait()
    asked.cancel()
    await until(lambda: bench.tiers.forward.responses[0].cancelled())
    assert bench.retries == []

"""A bounded queue in tokens: what does not fit is refused whole, what is accepted does not wait longer for it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from serve_app.errors import OverloadedError, ServeAppError
from serve_app.ingress.backlog import Backlog, tokens_in
from serve_app.ingress.deployment import Ingress
from serve_app.options import EmbeddingOptions
from serve_app.types import Chat, Request, TokenizeRequest
from tests.ingress.edge import CARD
from tests.ingress.test_coalescer import replica, settle
from tests.ingress.test_keys import Clock
from tests.ingress.test_protocols_open_inference import Context, request_of
from tests.ingress.tiers import Tiers, ingress_of

__all__ = ["replica"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_does_not_fit_is_refused_and_what_fits_is_not(clock: Clock) -> None:
    backlog = Backlog(100, clock)
    with backlog.admitted(60):
        with pytest.raises(OverloadedError), backlog.admitted(41):
            pytest.fail("it does not fit")
        with backlog.admitted(40):
            assert backlog.tokens == 100
    assert backlog.tokens == 0


def test_a_request_beyond_the_bound_is_taken_when_nothing_else_is_there(clock: Clock) -> None:
    backlog = Backlog(100, clock)
    with backlog.admitted(1000), pytest.raises(OverloadedError), backlog.admitted(1):
        pytest.fail("there is another")


def test_a_refused_request_is_told_when_half_the_queue_will_be_done(clock: Clock) -> None:
    """1,000 tokens in 10 s are 100 tokens/s; of 900 that wait, 400 are above half of the bound: 4 s."""
    backlog = Backlog(1000, clock)
    with backlog.admitted(1000):
        clock.now += 10
    assert backlog.tokens_per_s == pytest.approx(100)
    with backlog.admitted(900), pytest.raises(OverloadedError) as caught, backlog.admitted(101):
        pytest.fail("it does not fit")
    assert caught.value.retry_after_s == pytest.approx(4)


def test_idle_time_is_no_slowness_and_failures_are_no_speed(clock: Clock) -> None:
    backlog = Backlog(1000, clock)
    with backlog.admitted(100):
        clock.now += 1
    clock.now += 3600
    assert backlog.tokens_per_s == pytest.approx(100)
    with pytest.raises(ZeroDivisionError):
        _fail(backlog, clock)
    assert backlog.tokens == 0
    assert backlog.tokens_per_s < 60


def _fail(backlog: Backlog, clock: Clock) -> None:
    with backlog.admitted(1000):
        clock.now += 1
        raise ZeroDivisionError


def test_a_new_speed_is_soon_believed(clock: Clock) -> None:
    backlog = Backlog(10_000, clock)
    for tokens in [1000] * 60 + [10] * 60:
        with backlog.admitted(tokens):
            clock.now += 1
    assert backlog.tokens_per_s == pytest.approx(10, rel=0.5)


def test_without_a_measured_speed_the_wait_is_short_and_it_is_never_long(clock: Clock) -> None:
    backlog = Backlog(100, clock)
    assert backlog.wait_s() == 1
    with backlog.admitted(100):
        clock.now += 100
    with backlog.admitted(100):
        assert backlog.wait_s() == pytest.approx(50, rel=0.1)
    with backlog.admitted(10_000):
        assert backlog.wait_s() == 60


@pytest.mark.parametrize(
    ("inputs", "long_texts", "tokens"),
    [
        (("",), "truncate", 1),
        (("x" * 9,), "truncate", 3),
        (("x" * 1_000_000,), "truncate", CARD.max_input_tokens),
        (("x" * 4000,), "windows", 1000),
        (((1, 2, 3), "x" * 8), "error", 5),
        ((("xxxx", "yyyy"),), "error", 2),
        ((Chat(()),), "truncate", 1),
    ],
)
def test_tokens_are_estimated_from_what_will_be_computed(inputs: Any, long_texts: Any, tokens: int) -> None:
    assert tokens_in(TokenizeRequest(inputs, long_texts), CARD) == tokens


WINDOWED = [
    ("a" * 4 * 64, 60, {}, 64),
    ("a" * 4 * 68, 60, {}, 68 + 60),
    ("a" * 4 * 128, 60, {}, 128 + 16 * 60),
    ("a" * 4 * 128, 60, {"max_windows": 3}, 3 * 64),
    (("q" * 4 * 32, "a" * 4 * 128), 16, {"cut": "only_second"}, 128 + 6 * 16 + 7 * 32),
    (("q" * 4 * 60, "a" * 4 * 128), 16, {"cut": "only_second"}, 128 + 62 * 2 + 63 * 60),
    ("a" * 4 * 128, 8, {"max_tokens": 16}, 128 + 14 * 8),
]


@pytest.mark.parametrize(("value", "stride", "keys", "tokens"), WINDOWED)
def test_what_windows_share_is_computed_in_each(value: Any, stride: int, keys: Any, tokens: int) -> None:
    assert CARD.max_input_tokens == 64
    assert tokens_in(TokenizeRequest((value,), "windows", stride=stride, **keys), CARD) == tokens


def test_who_is_refused_by_the_replicas_waits_for_half_of_what_is_under_way(clock: Clock) -> None:
    backlog = Backlog(1000, clock)
    with backlog.admitted(1000):
        clock.now += 10
    with backlog.admitted(600):
        assert backlog.half_s() == pytest.approx(3)


class SlowTiers(Tiers):
    """A model that computes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.forward.go.clear()


@pytest.fixture
def tiers() -> SlowTiers:
    return SlowTiers()


@pytest.fixture
async def ingress(tiers: SlowTiers) -> Ingress:
    return await ingress_of(tiers, max_queued_tokens=100)


def ask(ingress: Ingress, *texts: str) -> asyncio.Task[Any]:
    return asyncio.create_task(ingress.answer(Request("id", "tiny", "embedding", texts, EmbeddingOptions())))


def outcome(task: asyncio.Task[Any]) -> str:
    error = task.exception()
    return error.code if isinstance(error, ServeAppError) else "ok" if error is None else repr(error)


async def test_a_slow_model_makes_the_ingress_refuse_at_the_bound_and_answer_all_it_accepted(
    ingress: Ingress, tiers: SlowTiers
) -> None:
    asked = [ask(ingress, "x" * 40) for _ in range(25)]
    await settle()
    assert sum(task.done() for task in asked) == 15
    tiers.forward.go.set()
    await asyncio.wait(asked)
    assert [outcome(task) for task in asked] == ["ok"] * 10 + ["overloaded"] * 15
    assert len([text for call in tiers.tokenize.calls for request in call.requests for text in request.inputs]) == 10


async def test_a_batch_is_accepted_or_refused_whole(ingress: Ingress, tiers: SlowTiers) -> None:
    first, batch, small = ask(ingress, "x" * 240), ask(ingress, *["x" * 40] * 5), ask(ingress, *["x" * 40] * 4)
    await settle()
    assert (first.done(), batch.done(), small.done()) == (False, True, False)
    assert outcome(batch) == "overloaded"
    tiers.forward.go.set()
    await asyncio.wait((first, small))
    assert all(len(request.inputs) in (1, 4) for call in tiers.tokenize.calls for request in call.requests)


async def test_who_leaves_makes_room(ingress: Ingress, tiers: SlowTiers) -> None:
    first = ask(ingress, "x" * 400)
    await settle()
    first.cancel()
    await settle()
    second = ask(ingress, "x" * 400)
    await settle()
    assert not second.done()
    tiers.forward.go.set()
    await second


async def test_a_probe_of_readiness_is_not_refused_by_a_full_queue(ingress: Ingress, tiers: SlowTiers) -> None:
    full = ask(ingress, "x" * 1000)
    await settle()
    probe = asyncio.create_task(ingress.ready())
    await settle()
    assert not probe.done()
    tiers.forward.go.set()
    await asyncio.gather(full, probe)


async def test_calls_by_grpc_stand_in_the_same_queue(ingress: Ingress, tiers: SlowTiers) -> None:
    first = ask(ingress, *["x" * 40] * 9)
    await settle()
    contexts = [Context() for _ in range(3)]
    calls = [asyncio.create_task(ingress.ModelInfer(request_of("x" * 40), context)) for context in contexts]
    await settle()
    assert [call.done() for call in calls] == [False, True, True]
    tiers.forward.go.set()
    await asyncio.wait((first, *calls))
    refused = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [context.code for context in contexts] == [grpc.StatusCode.OK, refused, refused]
    assert int(contexts[1].trailing["grpc-retry-pushback-ms"]) >= 1000

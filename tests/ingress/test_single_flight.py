"""Those who ask at the same time share one run, whoever of them leaves."""

from __future__ import annotations

import asyncio
import contextvars
import math
from typing import Any

import pytest

from serve_app.errors import UnavailableError
from serve_app.ingress.single_flight import SingleFlight
from tests.ingress.test_coalescer import settle


class Work:
    """Answers with the number of the run when it may."""

    def __init__(self) -> None:
        self.runs = 0
        self.ended = 0
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self) -> int:
        self.runs += 1
        run = self.runs
        await self.go.wait()
        self.ended += 1
        if self.failure is not None:
            raise self.failure
        return run


@pytest.fixture
async def work() -> Work:
    return Work()


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Any]]:
    """What was to be called later, and after how many seconds; the test calls it."""
    found: list[tuple[float, Any]] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda s, call, *_: found.append((s, call)))
    return found


async def test_callers_at_the_same_time_share_one_run(work: Work) -> None:
    flight = SingleFlight(work, 0.0)
    callers = [asyncio.create_task(flight()) for _ in range(20)]
    await settle()
    work.go.set()
    assert await asyncio.gather(*callers) == [1] * 20
    assert await flight() == 2, "it is over, and nothing is kept"


@pytest.mark.parametrize("leaving", [[0], [1, 2], [0, 1, 2]], ids=["the first", "others", "all"])
async def test_a_caller_that_leaves_takes_the_run_from_nobody(work: Work, leaving: list[int]) -> None:
    flight = SingleFlight(work, 0.0)
    callers = [asyncio.create_task(flight()) for _ in range(3)]
    await settle()
    for index in leaving:
        callers[index].cancel()
    await settle()
    late = asyncio.create_task(flight())
    await settle()
    work.go.set()
    outcomes = await asyncio.gather(*callers, late, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in outcomes] == [i in leaving for i in range(4)]
    assert (outcomes[3], work.runs, work.ended) == (1, 1, 1)


async def test_an_error_is_every_callers(work: Work) -> None:
    flight = SingleFlight(work, 0.0)
    work.failure = UnavailableError("gone")
    work.go.set()
    outcomes = await asyncio.gather(*(flight() for _ in range(5)), return_exceptions=True)
    assert outcomes == [work.failure] * 5
    assert work.runs == 1


@pytest.mark.parametrize("failure", [None, UnavailableError("gone")], ids=["answer", "error"])
async def test_an_outcome_is_kept_for_a_while(
    work: Work, timers: list[tuple[float, Any]], failure: Exception | None
) -> None:
    flight = SingleFlight(work, 1.5)
    work.failure = failure
    work.go.set()
    for _ in range(3):
        (outcome,) = await asyncio.gather(flight(), return_exceptions=True)
        assert outcome == (failure or 1)
    ((after_s, forget),) = timers
    assert after_s == 1.5
    forget()
    await asyncio.gather(flight(), return_exceptions=True)
    assert work.runs == 2


async def test_what_is_kept_for_ever_needs_no_timer(work: Work, timers: list[tuple[float, Any]]) -> None:
    flight = SingleFlight(work, math.inf)
    work.go.set()
    assert [await flight(), await flight()] == [1, 1]
    assert timers == []


async def test_the_run_is_in_no_callers_context() -> None:
    """Serve cancels all that was called in the context of a request whose client left."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")

    async def work() -> str:
        return request.get("none")

    request.set("the first caller's")
    assert await SingleFlight(work, 0.0)() == "none"

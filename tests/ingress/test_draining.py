"""Streams that are open when their replica stops: told before it is killed, and not cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from serve_app.errors import UnavailableError
from serve_app.ingress import draining, front
from serve_app.ingress.draining import Draining


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "POLL_S", 0.01)
    monkeypatch.setattr(draining, "MARGIN_S", 0.01)


class Replica:
    """Stops when it is told to."""

    def __init__(self, grace_s: float) -> None:
        self.stops = False
        self.looks = 0
        self.draining = Draining(self.is_stopping, lambda: grace_s)

    async def is_stopping(self) -> bool:
        self.looks += 1
        return self.stops


async def counted(most: int, closed: list[int]) -> AsyncGenerator[int, None]:
    """0, 1, ... and after `most` of them nothing more for ever."""
    try:
        for i in range(most):
            yield i
        await asyncio.sleep(3600)
    finally:
        closed.append(most)


@pytest.mark.parametrize("most", [1, 10**9], ids=["waiting for the next piece", "between pieces"])
async def test_a_stream_ends_with_an_error_before_the_replica_is_killed(most: int) -> None:
    replica, closed = Replica(grace_s=0.1), list[int]()

    async def read() -> None:
        async for _ in replica.draining.bounded(counted(most, closed)):
            replica.stops = True
            await asyncio.sleep(0.001)

    with pytest.raises(UnavailableError, match="stops"):
        await asyncio.wait_for(read(), 20)
    assert closed == [most]


async def test_a_stream_that_has_time_enough_is_not_touched() -> None:
    replica = Replica(grace_s=3600)
    replica.stops = True

    async def pieces() -> AsyncGenerator[int, None]:
        for i in range(10):
            await asyncio.sleep(0.01)
            yield i

    assert [piece async for piece in replica.draining.bounded(pieces())] == list(range(10))


async def test_a_client_that_leaves_is_no_stopping_replica() -> None:
    replica, closed = Replica(grace_s=3600), list[int]()
    reading = asyncio.ensure_future(anext(replica.draining.bounded(counted(0, closed))))
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert closed == [0]


async def test_a_stream_without_a_request_ends_as_soon_as_the_replica_stops() -> None:
    replica = Replica(grace_s=3600)

    async def requests() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(3600)

    async def read() -> None:
        async for _ in replica.draining.until_stopping(requests()):
            replica.stops = True

    with pytest.raises(UnavailableError):
        await asyncio.wait_for(read(), 20)


async def test_nobody_looks_while_no_stream_is_open() -> None:
    replica = Replica(grace_s=3600)

    async def nothing() -> AsyncGenerator[int, None]:
        return
        yield

    assert [piece async for piece in replica.draining.bounded(nothing())] == []
    await asyncio.sleep(0.05)
    looks = replica.looks
    await asyncio.sleep(0.05)
    assert replica.looks == looks


async def test_the_health_route_of_serve_tells_that_a_replica_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_behind", None)
    answers = [b"success"]

    async def serve(scope: object, receive: object, send: object) -> None:
        assert scope["path"] == "/-/healthz"  # type: ignore[index]
        await send({"type": "http.response.body", "body": answers[0]})  # type: ignore[operator]

    [made] = front.middlewares()
    made.cls(serve, *made.args, **made.kwargs)  # type: ignore[call-arg]
    assert not await front.is_stopping()
    answers[0] = b"DRAINING"
    assert await front.is_stopping()

"""Work is given its time and no more, and a cancellation reaches whoever it was meant for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app import timeouts
from serve_app.timeouts import within


@pytest.mark.parametrize("limit", [within, timeouts._within], ids=["this Python", "Python 3.10"])
async def test_work_is_given_its_time_and_no_more(limit: Callable[..., Awaitable[Any]]) -> None:
    async def fails() -> None:
        raise ValueError("its own")

    ended = asyncio.Event()

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert await limit(asyncio.sleep(0, "done"), 60.0) == "done"
    with pytest.raises(ValueError, match="its own"):
        await limit(fails(), 60.0)
    with pytest.raises(asyncio.TimeoutError):
        await limit(hangs(), 0.01)
    assert ended.is_set()


@pytest.mark.parametrize("limit", [within, timeouts._within], ids=["this Python", "Python 3.10"])
async def test_a_cancellation_is_never_lost(limit: Callable[..., Awaitable[Any]]) -> None:
    """`asyncio.wait_for` loses one in the moment in which the work is done, up to Python 3.11."""
    for turns in range(6):
        done = asyncio.Event()

        async def work(done: asyncio.Event = done) -> None:
            await limit(done.wait(), 60.0)
            await asyncio.Event().wait()

        working = asyncio.create_task(work())
        for _ in range(5):
            await asyncio.sleep(0)
        done.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        working.cancel()
        await asyncio.wait((working,), timeout=5)
        assert working.cancelled(), turns

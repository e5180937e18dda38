"""How long a client gives its request, and keeping to it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

from serve_app.errors import MalformedRequestError

T = TypeVar("T")

TIMEOUT = b"x-request-timeout-ms"
"""The request header: whole milliseconds from the request's arrival to its answer."""

_MOST_DIGITS = 12


def asked_timeout_s(value: bytes, most_s: float) -> float:
    """Seconds that the header asks for, at most `most_s`. Raises MalformedRequestError, which does not repeat it."""
    if not (value.isdigit() and len(value) <= _MOST_DIGITS and int(value)):
        raise MalformedRequestError(f"the header {TIMEOUT.decode()} must be a whole number of milliseconds above 0")
    return min(most_s, int(value) / 1e3)


async def within(work: Awaitable[T], timeout_s: float) -> T:
    """As `asyncio.wait_for` from Python 3.12 on.

    Before, `wait_for` makes a task for the work, a fifth of what the edge costs a request, and where the work is done
    in the moment in which the caller is cancelled, it returns and the cancellation is lost.

    Raises asyncio.TimeoutError.
    """
    if sys.version_info < (3, 11):
        return await _within(work, timeout_s)
    async with asyncio.timeout(timeout_s):
        return await work


async def _within(work: Awaitable[T], timeout_s: float) -> T:
    """The same for Python 3.10, which has no `asyncio.timeout`."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=timeout_s)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    await asyncio.wait((task,))
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()

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
    """As `asyncio.wait_for`, which before Python 3.12 makes a task for it, a fifth of what the edge costs a request.

    Raises asyncio.TimeoutError.
    """
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(work, timeout_s)
    async with asyncio.timeout(timeout_s):
        return await work

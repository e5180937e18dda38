"""What becomes of open streams when their ingress replica stops.

Serve lets a stopping replica finish what it has, for `graceful_shutdown_timeout_s`, and then kills it, without a word
to the application before. A stream that is still open then would be cut in the middle of its answer, which a client
can hardly tell from a complete one. So while streams are open, the replica asks itself whether it stops, and ends each
stream with an error shortly before it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import TypeAlias, TypeVar

from serve_app.errors import UnavailableError

T = TypeVar("T")

Waiting: TypeAlias = "dict[asyncio.Task[object], bool]"
"""Tasks that wait for a stream's next part, and whether they have been interrupted."""

POLL_S = 1.0
"""Seconds between two looks at whether the replica stops, while streams are open."""

MARGIN_S = 2.0
"""Seconds that an error has to reach its client before the replica is killed."""


class Draining:
    """Of one ingress replica. Belongs to one event loop."""

    def __init__(self, is_stopping: Callable[[], Awaitable[bool]], grace_s: Callable[[], float]) -> None:
        """`grace_s` tells how many seconds a replica has from when it stops until it is killed."""
        self._is_stopping = is_stopping
        self._grace_s = grace_s
        self._open = 0
        self._watching: asyncio.Task[None] | None = None
        self._stops = self._is_over = False
        self._idle: Waiting = {}
        self._busy: Waiting = {}

    async def bounded(self, pieces: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """`pieces`; raises UnavailableError if the replica has to go before they are complete."""
        async with aclosing(pieces):
            with self._watched():
                while True:
                    with _interruptible(self._busy, self._is_over):
                        try:
                            piece = await anext(pieces)
                        except StopAsyncIteration:
                            return
                    yield piece

    async def until_stopping(self, requests: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """`requests` of a stream; raises UnavailableError as soon as the replica stops and none is there."""
        with self._watched():
            while True:
                with _interruptible(self._idle, self._stops):
                    try:
                        request = await anext(requests)
                    except StopAsyncIteration:
                        return
                yield request

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._open += 1
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            self._open -= 1

    async def _watch(self) -> None:
        """Until no stream is open any more."""
        loop = asyncio.get_running_loop()
        killed_at = 0.0
        try:
            while self._open:
                if not self._stops and await self._is_stopping():
                    self._stops = True
                    killed_at = loop.time() - POLL_S + self._grace_s()
                self._is_over = self._stops and loop.time() >= killed_at - MARGIN_S - POLL_S
                if self._stops:
                    _interrupt(self._idle)
                if self._is_over:
                    _interrupt(self._busy)
                await asyncio.sleep(POLL_S)
        finally:
            self._watching = None


@contextmanager
def _interruptible(waiting: Waiting, is_over: bool) -> Iterator[None]:
    """The block may be interrupted. Raises UnavailableError then, and at once if `is_over`."""
    if is_over:
        raise _stopping()
    task = asyncio.current_task()
    assert task is not None
    waiting[task] = False
    try:
        yield
    except asyncio.CancelledError:
        if not waiting[task] or _is_cancelled_otherwise(task):
            raise
        raise _stopping() from None
    finally:
        del waiting[task]


def _interrupt(waiting: Waiting) -> None:
    for task, interrupted in waiting.items():
        if not interrupted:
            waiting[task] = True
            task.cancel()


def _is_cancelled_otherwise(task: asyncio.Task[object]) -> bool:
    """Take our own cancellation back; whether there is another one. Before Python 3.11 nobody can tell."""
    return sys.version_info >= (3, 11) and task.uncancel() > 0


def _stopping() -> UnavailableError:
    return UnavailableError(
        "this replica stops, and its time to finish is over; send the request again", retry_after_s=1.0
    )

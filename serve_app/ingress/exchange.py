"""One HTTP request and its reply, as endpoints see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope

from serve_app.ingress.dialect import Dialect
from serve_app.ingress.visit import Visit, too_late

T = TypeVar("T")
Header = tuple[bytes, bytes]

JSON = b"application/json"


class ClientDisconnectedError(Exception):
    """The client left before its answer was ready; nobody is there to be answered."""


@dataclass(slots=True, kw_only=True)
class Exchange(Visit):
    """A request that came by HTTP."""

    scope: Scope
    receive: Receive
    path_model: str | None = None
    """The model that the path names, as in `/models/{name}/embed`."""
    body_read: bool = False
    dialect: Dialect | None = None
    """How errors are written, where that shows only when the body is read; None: as the route says."""

    @property
    def body_is_unread(self) -> bool:
        if self.body_read:
            return False
        return b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint answers."""

    body: bytes | AsyncGenerator[bytes, None]
    """All of it, or its parts as they come; whoever sends the parts closes the generator."""
    status: int = 200
    content_type: bytes = JSON
    headers: tuple[Header, ...] = ()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves or the time is over.

    Call it when the body has been read. Raises what `work` raises, ClientDisconnectedError or DeadlineExceededError.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnectedError from leaving.exception()
        raise too_late()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            working.add_done_callback(_retrieve)


async def stream_while_connected(
    receive: Receive, pieces: AsyncIterator[T], timeout_s: float
) -> AsyncGenerator[T, None]:
    """`pieces`, until the client leaves or `timeout_s` is over for all of them together; then they are closed.

    Raises what `pieces` raises, ClientDisconnectedError or DeadlineExceededError.
    """
    end = time.perf_counter() + timeout_s
    leaving = asyncio.ensure_future(_disconnect(receive))
    working: asyncio.Future[T] | None = None
    try:
        while True:
            working = asyncio.ensure_future(_next(pieces))
            left_s = max(0.0, end - time.perf_counter())
            await asyncio.wait((working, leaving), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise ClientDisconnectedError from leaving.exception()
            if not working.done():
                raise too_late()
            try:
                piece = working.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        leaving.cancel()
        await _close(pieces, working)


async def _next(pieces: AsyncIterator[T]) -> T:
    return await pieces.__anext__()


async def _close(pieces: AsyncIterator[T], working: asyncio.Future[T] | None) -> None:
    """An async generator can be closed only when none of its steps is under way."""
    if working is not None and not working.done():
        working.cancel()
        await asyncio.wait((working,))
        _retrieve(working)
    if isinstance(pieces, AsyncGenerator):
        await pieces.aclose()


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the exception of work that nobody waits for any more, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()


async def _disconnect(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message

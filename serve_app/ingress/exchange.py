"""One HTTP request and its reply, as endpoints see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope

from serve_app.config import IngressSettings
from serve_app.errors import DeadlineExceededError
from serve_app.ingress.access import Account
from serve_app.ingress.service import Service
from serve_app.types import Answer, Request

T = TypeVar("T")
Header = tuple[bytes, bytes]

JSON = b"application/json"


class ClientDisconnectedError(Exception):
    """The client left before its answer was ready; nobody is there to be answered."""


@dataclass(slots=True)
class Exchange:
    """A request that is under way; `settings` are those in force when it arrived."""

    id: str
    scope: Scope
    receive: Receive
    headers: Mapping[bytes, bytes]
    service: Service
    settings: IngressSettings
    path_model: str | None = None
    """The model that the path names, as in `/models/{name}/embed`."""
    body_read: bool = False
    timeout_s: float = 0.0
    """Seconds that the request may take from its arrival on: the client's own, never more than the server's."""
    account: Account | None = None
    """Of the API key, where keys are on."""
    tokens: int = 0
    """Tokens that it has cost so far."""
    counted: bool = False
    """Whether it is among the requests under way, of which there may be only so many."""
    route: tuple[str, str] | None = None
    """Method and path of the route that was found, as the table has them."""
    request: Request | None = None
    answer: Answer | None = None
    status: int = 0
    """What was answered; 0 while nothing was."""
    code: str = "ok"
    """Of the error that was answered."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def time_left_s(self) -> float:
        return max(0.0, self.timeout_s - (time.perf_counter() - self.started))

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


def too_late() -> DeadlineExceededError:
    return DeadlineExceededError("the request's time ran out before its answer; send less at once or allow more time")


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the exception of work that nobody waits for any more, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()


async def _disconnect(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message

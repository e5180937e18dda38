"""One HTTP request and its reply, as endpoints see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope

from serve_app.config import IngressSettings
from serve_app.errors import DeadlineExceededError
from serve_app.ingress.service import Service

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
    started: float = field(default_factory=time.perf_counter)

    @property
    def body_is_unread(self) -> bool:
        if self.body_read:
            return False
        return b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint answers."""

    body: bytes
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
        raise DeadlineExceededError(f"no answer within {timeout_s:g} s; send less at once or try again later")
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            working.add_done_callback(_retrieve)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the exception of work that nobody waits for any more, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()


async def _disconnect(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message

"""Sending an answer to a client that may not take it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Scope, Send

from serve_app.ingress.exchange import ClientDisconnectedError, Exchange
from serve_app.timeouts import within

PART_BYTES = 2**18
"""Of an answer that is sent in parts. The server holds no more than one for a client that does not read."""


class ClientStalledError(ClientDisconnectedError):
    """The client is there and does not take its answer."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Sends the messages of one answer, each within `write_timeout_s`.

    And all within the request's own time and `write_timeout_s`, so that nobody is served for hours who takes a byte now
    and then. A server that does not wait for its clients is never late.
    """

    exchange: Exchange
    send: Send

    async def __call__(self, *messages: Message) -> None:
        """Raises ClientStalledError."""
        try:
            await within(self._send_all(messages), self._time_s())
        except asyncio.TimeoutError:
            raise ClientStalledError from None

    async def _send_all(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            await self.send(message)

    def _time_s(self) -> float:
        exchange = self.exchange
        most_s = exchange.settings.write_timeout_s
        passed_s = time.perf_counter() - exchange.started
        return min(most_s, max(0.0, exchange.timeout_s + most_s - passed_s))


def unchunked(scope: Scope, send: Send) -> Send:
    """`send`, but that a client of HTTP/1.0, which knows no chunks, gets an answer without a length until it is closed.

    Uvicorn's usual server writes such an answer in chunks to every client, and HAProxy passes them on. There is no
    setting for it, so its response is told that it has no chunks, and the length of each part before it comes.
    """
    response: Any = getattr(send, "__self__", None)
    if scope.get("http_version") != "1.0" or not hasattr(response, "expected_content_length"):
        return send
    has_length = True

    async def sent(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not has_length:
                response.chunked_encoding = response.keep_alive = False
        elif not has_length:
            response.expected_content_length = len(message.get("body", b""))
        await send(message)

    return sent


def part(body: bytes, *, more: bool) -> Message:
    """A message with a part of the answer; the last one has no `more`."""
    return {"type": "http.response.body", "body": body, "more_body": more}


async def write_whole(write: Writer, start: Message, body: bytes) -> None:
    """An answer that is there. Raises ClientStalledError."""
    if len(body) <= PART_BYTES:
        await write(start, part(body, more=False))
        return
    await write(start)
    for at in range(0, len(body), PART_BYTES):
        await write(part(body[at : at + PART_BYTES], more=at + PART_BYTES < len(body)))

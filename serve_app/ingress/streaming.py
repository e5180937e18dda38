"""Answers that are sent while they are made, as server-sent events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeAlias

from serve_app.errors import ServeAppError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import ClientDisconnectedError, Exchange, Header, Reply, stream_while_connected
from serve_app.ingress.statuses import kind_of
from serve_app.outputs import GeneratedPiece
from serve_app.types import Request

Events: TypeAlias = AsyncGenerator[bytes, None]
"""The data of each event, without its frame."""

EVENT_STREAM = b"text/event-stream; charset=utf-8"

_HEADERS: tuple[Header, ...] = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
"""Neither caches nor proxies may hold pieces back."""

_LINE_ENDS = {character.encode(): b"\\u%04x" % ord(character) for character in "\u0085\u2028\u2029"}
"""No line ends in an event stream, nor for JSON, but for httpx's `iter_lines`, by which huggingface_hub reads one."""


async def stream_reply(
    exchange: Exchange,
    request: Request,
    dialect: Dialect,
    write: Callable[[AsyncIterator[GeneratedPiece]], Events],
    headers: tuple[Header, ...] = (),
) -> Reply:
    """The reply to a request that wants its answer in pieces, as soon as the first one is there.

    So an error before the first piece is raised here, and answered as any other. The client's leaving and the
    deadline, which counts for the whole answer, end the work.
    """
    timeout_s = exchange.time_left_s
    pieces = _noted(exchange, stream_while_connected(exchange.receive, exchange.service.stream(request), timeout_s))
    events = _closing(pieces, write(pieces))
    first = await anext(events, b"")
    told = [*_HEADERS, *headers, (b"x-truncated-inputs", b"%d" % exchange.truncated)]
    if exchange.revision:
        told.append((b"x-model-revision", exchange.revision.encode()))
    return Reply(_framed(first, events, dialect, exchange), content_type=EVENT_STREAM, headers=tuple(told))


async def _noted(
    exchange: Exchange, pieces: AsyncGenerator[GeneratedPiece, None]
) -> AsyncGenerator[GeneratedPiece, None]:
    """`pieces`, of whose first one it is noted whether the prompt was cut, and by which revision it was read."""
    async with aclosing(pieces):
        async for piece in pieces:
            exchange.truncated += piece.truncated
            exchange.revision = exchange.revision or piece.revision
            yield piece


async def _closing(pieces: AsyncGenerator[GeneratedPiece, None], events: Events) -> Events:
    """`events`, which are made of `pieces`, with the end of the one as the end of the other."""
    async with aclosing(pieces), aclosing(events):
        async for data in events:
            yield data


async def _framed(first: bytes, events: Events, dialect: Dialect, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            if first:
                yield _event(first)
            async for data in events:
                yield _event(data)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            yield _event(_error(exchange.expected(error), dialect, exchange.id))


def _event(data: bytes) -> bytes:
    for end, escaped in _LINE_ENDS.items():
        data = data.replace(end, escaped)
    return b"data: %b\n\n" % data


def _error(error: ServeAppError, dialect: Dialect, request_id: str) -> bytes:
    write = dialect.write_broken_off or dialect.write_error
    return encode(write(error, kind_of(error), request_id))

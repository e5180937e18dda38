"""The load generator: a closed loop over keep-alive connections.

It shares the machine with the server that it measures, so it is as light as asyncio allows: requests are bytes made
beforehand, answers are counted, and only a sample is kept to be looked at when the clock has stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from serve_app.cli.bench.wire import Prepared

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"

CONNECTION_LOST = 0
"""Status of a request that got no answer: refused, reset, or out of time."""

_PAUSE_S = 0.1
"""After a lost connection, so that a server that is down is not hammered."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; times on `time.perf_counter`'s clock. `body` is kept for a sample only."""

    request: int
    started: float
    ended: float
    status: int
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured: from `start` to `end`. Load is kept up until all that began in it has ended."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def share(self, outcome: Outcome) -> float:
        """Which part of the request's time lay in the window.

        Summed over requests it is the work done in the window, without the whole requests that counting ends would
        put in or leave out at its edges: these are many where a request has 32 texts.
        """
        overlap = min(outcome.ended, self.end) - max(outcome.started, self.start)
        return max(0.0, overlap) / max(outcome.ended - outcome.started, 1e-9)

    def began(self, outcome: Outcome) -> bool:
        return self.start <= outcome.started < self.end


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard and how long: `warmup_s` of the same load come before the window of `seconds`."""

    connections: int
    seconds: float
    warmup_s: float = 2.0
    timeout_s: float = 120.0
    samples: int = 64


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection that is kept alive; one request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body_at = 0
        self._needed: int | None = None
        self._status = CONNECTION_LOST
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def ask(self, payload: bytes) -> tuple[int, bytes]:
        """Send a request; its status and body. Raises ConnectionError."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._fail(error or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._body_at and not self._read_head():
            return
        body = self._whole_chunks() if self._needed is None else self._whole_length(self._needed)
        if body is None:
            return
        self._buffer.clear()  # one request at a time: nothing follows an answer
        self._body_at = 0
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._status, body))

    def _read_head(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            return False
        length = _CONTENT_LENGTH.search(self._buffer, 0, end + 2)
        if length is None and _CHUNKED.search(self._buffer, 0, end + 2) is None:
            self._fail(ConnectionError("an answer of which neither length nor chunks are told"))
            self.close()
            return False
        self._status = int(self._buffer[9:12])
        self._body_at = end + len(_HEAD_END)
        self._needed = None if length is None else self._body_at + int(length[1])
        return True

    def _whole_length(self, needed: int) -> bytes | None:
        return bytes(self._buffer[self._body_at : needed]) if len(self._buffer) >= needed else None

    def _whole_chunks(self) -> bytes | None:
        """The chunks put together, once the last one is there (which can be told from the end of the buffer alone)."""
        at = self._body_at
        if not self._buffer.endswith(_LAST_CHUNK) or len(self._buffer) < at + len(_LAST_CHUNK):
            return None
        parts: list[bytes] = []
        while True:
            line = self._buffer.find(b"\r\n", at)
            size = int(self._buffer[at:line].partition(b";")[0], 16)
            if not size:
                return b"".join(parts)
            parts.append(bytes(self._buffer[line + 2 : line + 2 + size]))
            at = line + 2 + size + 2

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


@dataclass(slots=True)
class ClosedLoop:
    """So many connections, each sending its next request when the last one is answered.

    `outcomes` are kept unless `keep` is off, as it is for runs of hours.
    """

    host: str
    port: int
    requests: Sequence[Prepared]
    plan: Plan
    keep: bool = True
    outcomes: list[Outcome] = field(default_factory=list)
    _next: Iterator[int] = field(default_factory=itertools.count)
    _running: dict[int, float] = field(default_factory=dict)
    _kept_at: float = -math.inf
    _window: Window = field(default=Window(0.0, 0.0))

    async def run(
        self,
        on_start: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    ) -> Window:
        """Drive the server; `on_start` and `on_end` are called when the window begins and ends."""
        start = time.perf_counter() + self.plan.warmup_s
        self._window = Window(start, start + self.plan.seconds)
        clock = asyncio.create_task(self._clock(on_start, on_end))
        await asyncio.gather(*(self._connection(number, on_outcome) for number in range(self.plan.connections)))
        await clock
        return self._window

    async def _clock(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        await asyncio.sleep(self._window.start - time.perf_counter())
        on_start()
        await asyncio.sleep(self._window.end - time.perf_counter())
        on_end()

    async def _connection(self, number: int, on_outcome: Callable[[Outcome], None]) -> None:
        connection = Connection()
        while not self._is_over():
            if not connection.is_open:
                connection = await self._connect()
            outcome = await self._one(number, connection)
            if self.keep:
                self.outcomes.append(outcome)
            on_outcome(outcome)
            if outcome.status == CONNECTION_LOST:
                connection.close()
                await asyncio.sleep(_PAUSE_S)
        connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self.host, self.port)
        except OSError:
            return Connection()
        return connection

    async def _one(self, number: int, connection: Connection) -> Outcome:
        index = next(self._next) % len(self.requests)
        started = self._running[number] = time.perf_counter()
        try:
            if not connection.is_open:
                raise ConnectionRefusedError
            answer = connection.ask(self.requests[index].payload)
            status, body = await asyncio.wait_for(answer, self.plan.timeout_s)
        except (OSError, asyncio.TimeoutError):
            status, body = CONNECTION_LOST, b""
        ended = time.perf_counter()
        del self._running[number]
        return Outcome(index, started, ended, status, body if self._is_sample(started, status) else None)

    def _is_sample(self, started: float, status: int) -> bool:
        """Answers kept are spread evenly over the window."""
        if not self.plan.samples or status != 200 or not self._window.start <= started < self._window.end:
            return False
        if started - self._kept_at < self.plan.seconds / self.plan.samples:
            return False
        self._kept_at = started
        return True

    def _is_over(self) -> bool:
        end = self._window.end
        return time.perf_counter() >= end and all(started >= end for started in self._running.values())

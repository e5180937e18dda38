from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from serve_app.cli.bench.load import CONNECTION_LOST, ClosedLoop, Connection, Outcome, Plan, Window
from serve_app.cli.bench.wire import Prepared

REQUESTS = [Prepared(b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n" + bytes([48 + i]), i, 1, 5) for i in range(3)]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(1)


def answering(answer: bytes, delay_s: float = 0.0) -> Handler:
    """Keeps the connection alive."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await read_request(reader)
                await asyncio.sleep(delay_s)
                writer.write(answer)
                await writer.drain()
        writer.close()

    return handle


async def drive(port: int, **plan: Any) -> ClosedLoop:
    defaults: dict[str, Any] = {"connections": 2, "seconds": 0.2, "warmup_s": 0.05}
    loop = ClosedLoop("127.0.0.1", port, REQUESTS, Plan(**(defaults | plan)))
    await loop.run()
    return loop


async def test_every_request_is_answered_and_in_turn() -> None:
    async with listening(answering(OK)) as port:
        loop = await drive(port, connections=1)

    assert {outcome.status for outcome in loop.outcomes} == {200}
    assert [outcome.request for outcome in loop.outcomes[:4]] == [0, 1, 2, 0]


async def test_no_more_requests_are_under_way_than_connections() -> None:
    under_way, most = 0, 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await read_request(reader)
                under_way += 1
                most = max(most, under_way)
                await asyncio.sleep(0.01)
                under_way -= 1
                writer.write(OK)
        writer.close()

    async with listening(handle) as port:
        await drive(port, connections=5)

    assert most == 5


async def test_load_is_kept_up_until_all_that_began_in_the_window_has_ended() -> None:
    """Or the last requests would be answered by a server that has nothing else to do."""
    slow_one = True

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal slow_one
        delay_s, slow_one = (0.5 if slow_one else 0.01), False
        await answering(OK, delay_s)(reader, writer)

    async with listening(handle) as port:
        loop = ClosedLoop("127.0.0.1", port, REQUESTS, Plan(connections=2, seconds=0.3, warmup_s=0.0))
        window = await loop.run()

    longest = max(loop.outcomes, key=lambda outcome: outcome.ended - outcome.started)
    assert window.began(longest)
    assert longest.ended > window.end
    after = [outcome for outcome in loop.outcomes if outcome.started > window.end]
    assert after
    assert max(outcome.started for outcome in after) < longest.ended


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (OK, 200),
        (b"HTTP/1.1 429 Too Many Requests\r\nServer: x\r\nContent-Length: 0\r\n\r\n", 429),
        (b"HTTP/1.1 503 Unavailable\r\nCONTENT-LENGTH:3\r\n\r\nabc", 503),
    ],
)
async def test_the_status_is_read(answer: bytes, status: int) -> None:
    async with listening(answering(answer)) as port:
        loop = await drive(port)

    assert {outcome.status for outcome in loop.outcomes} == {status}


CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n[1,2,\r\nA;x=y\r\n3,4,5,6,7]\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "body"), [(OK, b"[]"), (CHUNKS, b"[1,2,3,4,5,6,7]"), (CHUNKS[:47] + CHUNKS[-5:], b"")]
)
@pytest.mark.parametrize("piece", [1, 7, 1000])
async def test_an_answer_in_pieces_is_put_together(answer: bytes, body: bytes, piece: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await read_request(reader)
            for i in range(0, len(answer), piece):
                writer.write(answer[i : i + piece])
                await writer.drain()
                await asyncio.sleep(0)
        await reader.read()
        writer.close()

    async with listening(handle) as port:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        for _ in range(2):
            assert await connection.ask(REQUESTS[0].payload) == (200, body)
        connection.close()


async def closes_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.close()


@pytest.mark.parametrize(
    "handler", [closes_at_once, answering(b"HTTP/1.1 200 OK\r\n\r\n[]")], ids=["closes", "no length"]
)
async def test_no_answer_is_an_error_and_not_a_hang(handler: Handler) -> None:
    async with listening(handler) as port:
        loop = await drive(port)

    assert {outcome.status for outcome in loop.outcomes} == {CONNECTION_LOST}


async def test_a_server_that_is_not_there_is_an_error_and_not_a_hang() -> None:
    loop = await drive(port=1)

    assert {outcome.status for outcome in loop.outcomes} == {CONNECTION_LOST}


async def test_a_request_that_takes_too_long_is_an_error() -> None:
    async with listening(answering(OK, delay_s=30)) as port:
        loop = await drive(port, timeout_s=0.1)

    assert {outcome.status for outcome in loop.outcomes} == {CONNECTION_LOST}


async def test_a_connection_that_the_server_closed_is_opened_again() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with listening(once) as port:
        loop = await drive(port, connections=1)

    assert sum(outcome.status == 200 for outcome in loop.outcomes) > 2


async def test_a_sample_of_bodies_is_kept_from_all_over_the_window() -> None:
    async with listening(answering(OK, delay_s=0.001)) as port:
        loop = await drive(port, seconds=0.4, samples=8)

    kept = [outcome.started for outcome in loop.outcomes if outcome.body is not None]
    assert 2 <= len(kept) <= 8
    assert {outcome.body for outcome in loop.outcomes} == {b"[]", None}
    assert max(kept) - min(kept) > 0.2


async def test_the_clock_is_called_at_the_windows_edges() -> None:
    calls: list[str] = []
    done = threading.Event()

    async with listening(answering(OK, delay_s=0.01)) as port:
        loop = ClosedLoop("127.0.0.1", port, REQUESTS, Plan(connections=1, seconds=0.1, warmup_s=0.05))
        await loop.run(lambda: calls.append("start"), lambda: calls.append("end"), lambda outcome: done.set())

    assert calls == ["start", "end"]
    assert done.is_set()


def test_work_counts_by_the_part_that_lies_in_the_window() -> None:
    window = Window(10.0, 20.0)

    assert window.share(Outcome(0, 11.0, 12.0, 200)) == pytest.approx(1.0)
    assert window.share(Outcome(0, 8.0, 12.0, 200)) == pytest.approx(0.5)
    assert window.share(Outcome(0, 19.0, 23.0, 200)) == pytest.approx(0.25)
    assert window.share(Outcome(0, 5.0, 25.0, 200)) == pytest.approx(0.5)
    assert window.share(Outcome(0, 21.0, 22.0, 200)) == 0.0


def test_a_steady_server_is_measured_right_whatever_the_edges() -> None:
    """8 connections answered together every 3 s: 8/3 a second, though only 3 rounds end in 10 s."""
    outcomes = [Outcome(0, 3.0 * i, 3.0 * (i + 1), 200) for i in range(20) for _ in range(8)]

    for start in (20.0, 21.0, 22.5):
        window = Window(start, start + 10.0)
        assert sum(map(window.share, outcomes)) / window.seconds == pytest.approx(8 / 3)

"""What only HAProxy and Ray Serve's own server between client and application can get wrong."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.live import Live, served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

GOOD = b'{"inputs":"a"}'
HIDDEN = b"GET /hidden HTTP/1.1\r\nhost: a\r\n\r\n"
BODY_TIMEOUT_S = 1.0
PIECES = 1000
"""Of a million bytes each, of a body that is refused."""
MOST_MORE_RSS = 64 << 20


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["deployments"][0]["user_config"]["body_timeout_s"] = BODY_TIMEOUT_S

    with served(change) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[socket.socket]:
    host, _, port = live.base_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def _good_requests_are_answered_afterwards(live: Live) -> Iterator[None]:
    yield
    for _ in range(20):  # More than there are connections from HAProxy to a replica.
        response = httpx.post(f"{live.base_url}/embed", content=GOOD, timeout=60)
        assert response.status_code == 200, response.text
        assert len(response.json()[0]) == 384


def head(*lines: bytes) -> bytes:
    fixed = b"POST /embed HTTP/1.1", b"host: localhost", b"content-type: application/json"
    return b"\r\n".join((*fixed, *lines, b"", b""))


def answered(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection, or stops to send."""
    parts = []
    client.settimeout(3 * BODY_TIMEOUT_S)
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]


@pytest.mark.parametrize(
    "sent",
    [
        head(b"content-length: 14") + GOOD[:5],
        head(b"transfer-encoding: chunked") + b"5\r\n" + GOOD[:5] + b"\r\n",
        head(b"transfer-encoding: chunked") + b"ffff\r\n" + GOOD,
        head(b"content-length: 14"),
    ],
    ids=["cut short", "chunks without an end", "a chunk cut short", "no body"],
)
def test_a_body_that_never_ends_is_a_408(client: socket.socket, sent: bytes) -> None:
    client.sendall(sent)
    answer = answered(client)
    assert statuses(answer) == [408]
    assert b'"code":"body_timeout"' in answer
    assert b"x-request-id: " in answer.lower()


def test_a_body_in_drips_is_a_408_though_something_comes_all_the_time(client: socket.socket) -> None:
    client.sendall(head(b"content-length: 100000") + GOOD[:1])
    client.settimeout(0.1)
    give_up = time.monotonic() + 60
    answer = b""
    while not answer and time.monotonic() < give_up:
        with contextlib.suppress(TimeoutError):
            answer = client.recv(65536)
        if not answer:
            client.sendall(b" ")
    assert statuses(answer) == [408]


@pytest.mark.parametrize("half_closes", [True, False], ids=["half closed", "closed"])
def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(live: Live, half_closes: bool) -> None:
    host, _, port = live.base_url.removeprefix("http://").partition(":")
    for _ in range(50):
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(head(b"content-length: 14") + GOOD[:5])
            if half_closes:
                client.shutdown(socket.SHUT_WR)
                assert all(status < 500 for status in statuses(answered(client)))


def test_connections_that_are_reset_harm_nobody(live: Live) -> None:
    host, _, port = live.base_url.removeprefix("http://").partition(":")
    for sent in (head(b"content-length: 14") + GOOD[:5], head(b"content-length: 14") + GOOD, b"POST /embed HT") * 20:
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(sent)


def rss(live: Live) -> int:
    """Of all processes of the server."""
    total = 0
    for process in live.processes():
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


@pytest.mark.parametrize("framing", [b"content-length: 1000000000", b"transfer-encoding: chunked"], ids=bytes.decode)
def test_a_stream_of_a_gigabyte_is_refused_early_and_kept_nowhere(
    live: Live, client: socket.socket, framing: bytes
) -> None:
    """Though the client goes on with it, as long as it is let."""
    before = most = rss(live)
    refused_after = None
    piece = b"x" * 1_000_000
    chunk = b"%x\r\n%s\r\n" % (len(piece), piece) if b"chunked" in framing else piece
    client.sendall(head(framing))
    for sent in range(PIECES):
        try:
            client.sendall(chunk)
            hears = bool(select.select([client], [], [], 0)[0])
        except ConnectionError:
            hears = True
        if hears and refused_after is None:
            refused_after = sent
        if sent % 20 == 0:
            most = max(most, rss(live))
    assert set(statuses(answered(client))) <= {413}
    assert refused_after is not None
    assert refused_after < PIECES // 2
    assert max(most, rss(live)) - before < MOST_MORE_RSS


@pytest.mark.parametrize(
    "sent",
    [
        head(b"content-length: 5", b"transfer-encoding: chunked") + b"0\r\n\r\n" + HIDDEN,
        head(b"transfer-encoding: chunked", b"content-length: 5") + b"0\r\n\r\n" + HIDDEN,
        head(b"content-length: 14", b"content-length: 0") + GOOD + HIDDEN,
        head(b"content-length: 0, 14") + GOOD + HIDDEN,
        head(b"transfer-encoding: xchunked", b"content-length: 5") + b"0\r\n\r\n" + HIDDEN,
        head(b"transfer-encoding: chunked, identity") + b"0\r\n\r\n" + HIDDEN,
        head(b"transfer-encoding : chunked", b"content-length: 5") + b"0\r\n\r\n" + HIDDEN,
        head(b"transfer-encoding:\x0bchunked", b"content-length: 5") + b"0\r\n\r\n" + HIDDEN,
        head(b"x: y\ntransfer-encoding: chunked", b"content-length: 5") + b"0\r\n\r\n" + HIDDEN,
        head(b"content-length: +14") + GOOD + HIDDEN,
        head(b"transfer-encoding: chunked") + b"0;\n\r\n\r\n" + HIDDEN,
        head(b"transfer-encoding: chunked") + b"0x0\r\n\r\n" + HIDDEN,
    ],
)
def test_a_hidden_request_is_never_answered_to_another_client(live: Live, sent: bytes) -> None:
    """The answers to good requests, which share connections with these between HAProxy and the replica, are theirs."""
    host, _, port = live.base_url.removeprefix("http://").partition(":")
    with httpx.Client(base_url=live.base_url, timeout=60) as other:
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=60) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                assert all(status < 500 for status in statuses(answered(client)))
            response = other.post("/embed", content=GOOD)
            assert response.status_code == 200, response.text

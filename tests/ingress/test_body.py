"""Request bodies over a real connection: too large, too slow, cut short, in pieces."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from serve_app.config import IngressSettings, parse
from serve_app.errors import ConfigError
from tests.ingress.edge import FakeService, client_of, edge_app, served

GOOD = b'{"inputs":"a"}'


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """Raw HTTP, so that a test decides what is sent and when."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, address: tuple[str, int]) -> Connection:
        return cls(*await asyncio.open_connection(*address))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, *headers: str, path: str = "/embed") -> None:
        lines = [f"POST {path} HTTP/1.1", "host: edge", "content-type: application/json", *headers, "", ""]
        await self.send("\r\n".join(lines).encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def response(self) -> Response:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)).decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 20)
        return Response(int(head[0].split()[1]), headers, body)

    async def is_closed_by_the_server(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), 20) == b""


LARGE = b'{"inputs":"%s"}' % (b"a" * 585)


@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
async def test_bodies_that_are_too_much_together_are_refused_and_have_their_place_later(
    service: FakeService, is_chunked: bool
) -> None:
    """A declared length counts before the body comes; in chunks, what has come."""
    service.go.clear()
    app = edge_app(service, max_body_bytes=1000, max_bodies_bytes=1000)
    async with served(app) as address:
        first = await Connection.open(address)
        if is_chunked:
            await first.head("transfer-encoding: chunked")
            await first.chunk(LARGE)
            await first.chunk(b"")
            await asyncio.wait_for(service.started.wait(), 20)
        else:
            await first.head(f"content-length: {len(LARGE)}")
            await asyncio.sleep(0.1)
        second = await Connection.open(address)
        await second.head(f"content-length: {len(LARGE)}")
        await second.send(LARGE)
        refused = await second.response()
        assert (refused.status, json.loads(refused.body)["code"]) == (429, "overloaded")
        assert "1000 bytes of bodies" in refused.body.decode()
        small = await Connection.open(address)
        await small.head(f"content-length: {len(GOOD)}")
        await small.send(GOOD)
        service.go.set()
        assert (await small.response()).status == 200
        if not is_chunked:
            await first.send(LARGE)
        assert (await first.response()).status == 200
        again = await Connection.open(address)
        await again.head(f"content-length: {len(LARGE)}")
        await again.send(LARGE)
        assert (await again.response()).status == 200


def test_one_body_must_fit_beside_none() -> None:
    with pytest.raises(ConfigError, match="raise it"):
        parse(IngressSettings, {"max_bodies_bytes": 1000}, "user_config")


def test_a_body_holds_the_most_texts_as_splitters_cut_them() -> None:
    settings = IngressSettings()
    body = json.dumps({"inputs": ["a" * 4000] * settings.max_client_batch_size})
    assert len(body) <= settings.max_body_bytes


async def test_a_body_in_pieces_is_put_together(service: FakeService) -> None:
    async with served(edge_app(service)) as address:
        connection = await Connection.open(address)
        await connection.head("transfer-encoding: chunked")
        for piece in (GOOD[:3], GOOD[3:9], GOOD[9:]):
            await connection.chunk(piece)
            await asyncio.sleep(0.01)
        await connection.chunk(b"")
        assert (await connection.response()).status == 200


async def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_sent(service: FakeService) -> None:
    async with served(edge_app(service, max_body_bytes=1000)) as address:
        connection = await Connection.open(address)
        await connection.head("content-length: 1001")
        response = await connection.response()
    assert response.status == 413
    assert response.json()["code"] == "body_too_large"
    assert response.headers["connection"] == "close"


async def test_an_endless_stream_is_refused_as_soon_as_the_limit_is_passed(service: FakeService) -> None:
    async with served(edge_app(service, max_body_bytes=1000)) as address:
        connection = await Connection.open(address)
        await connection.head("transfer-encoding: chunked")
        await connection.chunk(b'{"inputs":"')
        for _ in range(10):
            await connection.chunk(b"x" * 100)
        response = await connection.response()
        assert response.status == 413
        assert service.requests == []


async def test_a_client_that_sends_all_before_it_reads_still_gets_the_refusal(service: FakeService) -> None:
    """Closing the connection while the client is sending would reset it, and the client would never see why."""

    async def pieces() -> Any:
        for _ in range(200):
            yield b"x" * 100_000

    app = edge_app(service, max_body_bytes=1000)
    async with served(app) as (host, port), httpx.AsyncClient(timeout=30) as client:
        url = f"http://{host}:{port}/embed"
        assert (await client.post(url, content=b"x" * 20_000_000)).status_code == 413
        assert (await client.post(url, content=pieces())).status_code == 413
        assert (await client.post(url, content=GOOD)).status_code == 200


async def test_the_connection_of_a_refused_body_is_closed_in_the_end(service: FakeService) -> None:
    async with served(edge_app(service, max_body_bytes=10)) as address:
        connection = await Connection.open(address)
        await connection.head("content-length: 1000")
        assert (await connection.response()).status == 413
        assert await connection.is_closed_by_the_server()


async def test_a_body_that_drips_is_given_up(service: FakeService) -> None:
    async with served(edge_app(service, body_timeout_s=0.2)) as address:
        connection = await Connection.open(address)
        await connection.head(f"content-length: {len(GOOD)}")
        await connection.send(GOOD[:5])
        response = await connection.response()
        assert response.status == 408
        assert response.json()["code"] == "body_timeout"
        assert response.headers["connection"] == "close"
        assert await connection.is_closed_by_the_server()


async def test_a_body_cut_short_reaches_nobody_and_harms_nobody(service: FakeService) -> None:
    async with served(edge_app(service)) as address:
        connection = await Connection.open(address)
        await connection.head(f"content-length: {len(GOOD)}")
        await connection.send(GOOD[:5])
        connection.writer.close()
        good = await Connection.open(address)
        await good.head(f"content-length: {len(GOOD)}")
        await good.send(GOOD)
        assert (await good.response()).status == 200
    assert len(service.requests) == 1


async def test_a_client_that_waits_for_100_continue_is_told_to_go_on(service: FakeService) -> None:
    async with served(edge_app(service)) as address:
        connection = await Connection.open(address)
        await connection.head(f"content-length: {len(GOOD)}", "expect: 100-continue")
        interim = await asyncio.wait_for(connection.reader.readuntil(b"\r\n\r\n"), 20)
        assert interim.startswith(b"HTTP/1.1 100")
        await connection.send(GOOD)
        assert (await connection.response()).status == 200


async def test_a_client_that_waits_for_100_continue_is_refused_without_sending(service: FakeService) -> None:
    async with served(edge_app(service, max_body_bytes=10)) as address:
        connection = await Connection.open(address)
        await connection.head("content-length: 1000", "expect: 100-continue")
        assert (await connection.response()).status == 413


async def test_requests_follow_each_other_on_one_connection(service: FakeService) -> None:
    async with served(edge_app(service)) as address:
        connection = await Connection.open(address)
        for _ in range(3):
            await connection.head(f"content-length: {len(GOOD)}")
            await connection.send(GOOD)
            assert (await connection.response()).status == 200


@pytest.mark.parametrize(
    ("media", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
        ("application/vnd.api+json", 200),
        ("text/json", 200),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/plain", 415),
        ("application/octet-stream", 415),
    ],
)
async def test_only_json_is_taken(client: httpx.AsyncClient, media: str | None, status: int) -> None:
    headers = {} if media is None else {"content-type": media}
    response = await client.post("/embed", content=GOOD, headers=headers)
    assert response.status_code == status
    if status == 415:
        assert "application/json" in response.json()["error"]


async def test_a_compressed_body_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post("/embed", content=GOOD, headers={"content-encoding": "gzip"})
    assert response.status_code == 415


async def test_a_body_of_just_the_limit_is_taken(service: FakeService) -> None:
    async with client_of(service, max_body_bytes=len(GOOD)) as client:
        assert (await client.post("/embed", content=GOOD)).status_code == 200
        assert (await client.post("/embed", content=GOOD + b" ")).status_code == 413


async def test_a_refused_request_has_no_place_while_its_body_is_waited_for(service: FakeService) -> None:
    app = edge_app(service, max_concurrent_requests=1)
    async with served(app) as address, httpx.AsyncClient(trust_env=False) as client:
        connection = await Connection.open(address)
        await connection.head("content-encoding: gzip", "content-length: 100")
        assert (await connection.response()).status == 415
        good = await client.post(f"http://{address[0]}:{address[1]}/embed", content=GOOD)
        assert good.status_code == 200
        connection.writer.close()

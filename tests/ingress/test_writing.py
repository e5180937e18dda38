"""Clients that ask, and do not take the answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import ASGIApp

from serve_app.ingress.asgi import App
from serve_app.ingress.front import Front
from serve_app.ingress.writing import PART_BYTES
from serve_app.outputs import GeneratedPiece
from serve_app.types import Request
from tests.ingress.edge import FakeService, edge_app, served
from tests.ingress.test_asgi import wait_until_set

GOOD = {"inputs": "a"}


class Talkative(FakeService):
    """Has an answer of some megabytes, whole or in pieces without an end."""

    async def memory(self, name: str) -> str:
        return "x" * 32 * PART_BYTES

    async def decode(self, *asked: object) -> list[str]:
        return ["x" * 32 * PART_BYTES]

    async def stream(self, request: Request) -> AsyncIterator[GeneratedPiece]:
        try:
            while True:
                yield GeneratedPiece("x" * 50_000, 5, prompt_tokens=3)
                await asyncio.sleep(0)
        finally:
            self.cancelled.set()


@pytest.fixture
def service() -> Talkative:
    return Talkative(task="text-generation")


def under_way(app: App) -> int:
    return app._door._requests._taken + app._door._questions._taken


async def until_free(app: App) -> None:
    while under_way(app):
        await asyncio.sleep(0.01)


async def post(address: tuple[str, int], path: str, body: object) -> socket.socket:
    """A connection that has asked, and of which nothing is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    connection.setblocking(False)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(connection, head.encode() + raw)
    return connection


async def rest_of(connection: socket.socket) -> int:
    """Bytes that come until the connection ends, however it does."""
    received = 0
    with contextlib.closing(connection), contextlib.suppress(ConnectionResetError):
        while some := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 2**16), 20):
            received += len(some)
    return received


@pytest.mark.parametrize("body", [{"ids": [5]}, {"inputs": "a", "stream": True}], ids=["whole", "stream"])
@pytest.mark.parametrize("front", [False, True], ids=["alone", "behind the front"])
async def test_a_client_that_does_not_read_loses_its_place_and_its_connection(
    service: Talkative, body: dict[str, object], front: bool
) -> None:
    app = edge_app(service, max_concurrent_requests=1, write_timeout_s=0.2)
    served_app: ASGIApp = Front(app) if front else app
    async with served(served_app) as address, httpx.AsyncClient(trust_env=False) as client:
        connection = await post(address, "/decode" if "ids" in body else "/models/tiny", body)
        while not under_way(app):
            await asyncio.sleep(0.001)
        refused = await client.post(f"http://{address[0]}:{address[1]}/embed", json=GOOD)
        assert refused.status_code == 429
        await asyncio.wait_for(until_free(app), 20)
        assert (await client.post(f"http://{address[0]}:{address[1]}/embed", json=GOOD)).status_code == 200
        assert await rest_of(connection) < 31 * PART_BYTES
        if "stream" in body:
            await wait_until_set(service.cancelled)


async def test_a_client_that_reads_slowly_gets_all_of_a_long_answer(service: Talkative) -> None:
    app = edge_app(service, write_timeout_s=5)
    async with served(Front(app)) as address:
        connection = await post(address, "/decode", {"ids": [5]})
        await asyncio.sleep(0.1)
        assert under_way(app) == 1
        assert await asyncio.wait_for(rest_of_kept(connection), 20) > 32 * PART_BYTES
        await asyncio.wait_for(until_free(app), 20)


async def rest_of_kept(connection: socket.socket) -> int:
    """Bytes of the one answer on a connection that stays open."""
    received = 0
    while received <= 32 * PART_BYTES:
        received += len(await asyncio.get_running_loop().sock_recv(connection, 2**16))
    connection.close()
    return received


async def test_a_client_that_takes_a_little_now_and_then_is_not_served_for_ever(service: Talkative) -> None:
    """Each part is taken in time, and all of them together are not."""
    app = edge_app(service, request_timeout_s=0.2, write_timeout_s=0.5)
    async with served(Front(app)) as address:
        connection = await post(address, "/models/tiny", {"inputs": "a", "stream": True})
        dripping = asyncio.ensure_future(drip(connection))
        await wait_until_set(service.cancelled)
        await asyncio.wait_for(until_free(app), 20)
        dripping.cancel()
        connection.close()


async def drip(connection: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(connection, 2**12):
        await asyncio.sleep(0.02)

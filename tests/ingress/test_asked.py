"""A client may give its request less time than the server would, and never more, and let others go first."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from serve_app.errors import MalformedRequestError
from serve_app.ingress.asked import asked_priority, asked_timeout_s, room_for
from tests.ingress.edge import FakeService, client_of, edge_app, served
from tests.ingress.test_body import Connection

GOOD = {"inputs": "a"}
HEADER = "x-request-timeout-ms"


def test_milliseconds_become_seconds_and_are_clamped() -> None:
    assert asked_timeout_s(b"1500", 60.0) == 1.5
    assert asked_timeout_s(b"90000", 60.0) == 60.0
    assert asked_timeout_s(b"999999999999", 60.0) == 60.0


@pytest.mark.parametrize("value", [b"", b"0", b"-1", b"1.5", b"1e3", b"nan", b"soon", b"\xff", b"9" * 5000, b" 5"])
def test_anything_else_is_refused_without_repeating_it(value: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="milliseconds above 0"):
        asked_timeout_s(value, 60.0)


@pytest.mark.parametrize(("path", "told"), [("/embed", "code"), ("/v1/embeddings", "error")])
async def test_a_wrong_header_is_a_400_in_the_shape_of_the_protocol(
    client: httpx.AsyncClient, service: FakeService, path: str, told: str
) -> None:
    response = await client.post(path, json={**GOOD, "input": "a"}, headers={HEADER: "soon"})
    assert response.status_code == 400
    assert told in response.json()
    assert "soon" not in response.text
    assert service.requests == []


async def test_the_clients_deadline_is_a_504_and_cancels_the_work(service: FakeService) -> None:
    service.go.clear()
    async with client_of(service) as client:
        response = await client.post("/embed", json=GOOD, headers={HEADER: "50"})
    assert response.status_code == 504
    assert response.json()["code"] == "deadline_exceeded"
    await asyncio.wait_for(service.cancelled.wait(), 20)


async def test_the_service_is_told_what_is_left_and_never_more_than_the_server_allows(service: FakeService) -> None:
    async with client_of(service, request_timeout_s=7.0) as client:
        await client.post("/embed", json=GOOD)
        await client.post("/embed", json=GOOD, headers={HEADER: "3000"})
        await client.post("/embed", json=GOOD, headers={HEADER: "3000000"})
    untold, short, long = (request.timeout_s for request in service.requests)
    assert untold is None
    assert short is not None
    assert long is not None
    assert 0 < short <= 3 < long <= 7


async def test_the_bodys_way_here_counts(service: FakeService) -> None:
    async with served(edge_app(service)) as address:
        connection = await Connection.open(address)
        await connection.head("content-length: 14", f"{HEADER}: 50")
        response = await connection.response()
    assert response.status == 504
    assert json.loads(response.body)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("value", [b"", b"high", b"Bulk", b"bulk ", b"\xff"])
def test_any_other_priority_is_refused_without_repeating_it(value: bytes) -> None:
    with pytest.raises(MalformedRequestError, match=r"x-priority must be interactive or bulk$"):
        asked_priority(value)


async def test_the_service_is_told_the_priority(service: FakeService) -> None:
    async with client_of(service) as client:
        await client.post("/embed", json=GOOD)
        await client.post("/embed", json=GOOD, headers={"x-priority": "bulk"})
        await client.post("/embed", json=GOOD, headers={"x-priority": "interactive"})
    assert [request.priority for request in service.requests] == ["interactive", "bulk", "interactive"]


async def test_bulk_requests_leave_places_to_interactive_ones(service: FakeService) -> None:
    assert (room_for("interactive", 8), room_for("bulk", 8), room_for("bulk", 1)) == (8, 6, 1)
    service.go.clear()
    async with client_of(service, max_concurrent_requests=8) as client:
        bulk = [
            asyncio.ensure_future(client.post("/embed", json=GOOD, headers={"x-priority": "bulk"})) for _ in range(8)
        ]
        done, _ = await asyncio.wait(bulk, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 2:
            done, _ = await asyncio.wait(bulk, timeout=0.1)
        others = [asyncio.ensure_future(client.post("/embed", json=GOOD)) for _ in range(2)]
        service.go.set()
        assert [one.status_code for one in await asyncio.gather(*others)] == [200, 200]
        assert sorted(one.status_code for one in await asyncio.gather(*bulk)) == [200] * 6 + [429] * 2

"""No page of another origin may read an answer: no response says so, and no preflight is granted."""

from __future__ import annotations

import httpx
import pytest

from serve_app.ingress.routes import Route
from tests.ingress.edge import FakeService, edge_app
from tests.ingress.test_openapi import example_of

ROUTES = edge_app(FakeService()).routes
REFUSING = [route for route in ROUTES if route.summary == "Not supported"]
PREFLIGHT = {
    "origin": "https://elsewhere.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


def grants(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith(("access-control", "cross-origin", "timing-allow"))}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_no_route_grants_anything_to_another_origin(client: httpx.AsyncClient, route: Route) -> None:
    path = route.path.replace("{name}", "tiny")
    body = example_of(route.path) if route.body is not None else None
    answered = await client.request(route.method, path, json=body, headers={"origin": PREFLIGHT["origin"]})
    failed = await client.request(route.method, path, content=b"{", headers={"origin": "null"})
    asked = await client.options(path, headers=PREFLIGHT)
    assert answered.status_code < 400 or route in REFUSING
    assert asked.status_code == 405
    assert [grants(response) for response in (answered, failed, asked)] == [set()] * 3


async def test_nor_does_a_path_that_is_not_there(client: httpx.AsyncClient) -> None:
    response = await client.options("/nothing", headers=PREFLIGHT)
    assert response.status_code == 404
    assert not grants(response)


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null"])
@pytest.mark.parametrize("media", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_page_cannot_even_ask_blindly(
    client: httpx.AsyncClient, service: FakeService, origin: str, media: str | None
) -> None:
    """Browsers ask for leave before they send any other type for a page."""
    headers = {"origin": origin} | ({} if media is None else {"content-type": media})
    response = await client.post("/embed", content=b'{"inputs":"a"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["code"] == "unsupported_media_type"
    assert service.requests == []


async def test_without_an_origin_no_type_is_json(client: httpx.AsyncClient) -> None:
    assert (await client.post("/embed", content=b'{"inputs":"a"}')).status_code == 200

"""What Ray Serve answers itself goes out in the shape of the protocol; what the application answers is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import _apply_middlewares, convert_object_to_asgi_messages, retry_after_headers

from serve_app.ingress.front import middlewares
from tests.ingress.edge import FakeService, edge_app

App = Callable[[Any, Any, Any], Awaitable[None]]
SECRET = "Traceback: the secret text in /home/somebody"


def behind(app: App) -> httpx.AsyncClient:
    """A client of `app` behind what Serve puts before everything it answers."""
    transport = httpx.ASGITransport(_apply_middlewares(app, middlewares()), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://serve")


def serve_says(status: int, *, wait_s: float | None = None, body: Any = SECRET) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in convert_object_to_asgi_messages(body, status, retry_after_headers(wait_s)):
            await send(message)

    return app


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [
        (404, 404, "route_not_found"),
        (408, 504, "deadline_exceeded"),
        (429, 429, "overloaded"),
        (500, 500, "internal"),
        (502, 500, "internal"),
        (503, 503, "unavailable"),
        (504, 504, "deadline_exceeded"),
        (418, 400, "bad_request"),
    ],
)
@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/embed", {"error", "error_type", "code", "request_id"}),
        ("/models/tiny", {"error", "error_type", "code", "request_id"}),
        ("/v1/embeddings", {"error"}),
        ("/prefix/v1/embeddings", {"error"}),
        ("/v2/models/tiny/infer", {"error", "code", "request_id"}),
        ("/prefix/v2", {"error", "code", "request_id"}),
    ],
)
async def test_each_error_of_serves_has_the_shape_of_the_protocol(
    path: str, shape: set[str], status: int, told: int, code: str
) -> None:
    async with behind(serve_says(status)) as client:
        response = await client.post(path, headers={"x-request-id": "job-7"})
    body = response.json()
    inner = body["error"] if shape == {"error"} else body
    assert (response.status_code, inner["code"], set(body)) == (told, code, shape)
    assert response.headers.get_list("x-request-id") == ["job-7"]
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (told in (429, 503))


async def test_when_to_come_back_is_kept() -> None:
    async with behind(serve_says(503, wait_s=6.5)) as client:
        assert (await client.get("/")).headers.get_list("retry-after") == ["7"]


async def test_an_exception_of_serves_tells_nothing_of_itself() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError(SECRET)

    async with behind(app) as client:
        response = await client.post("/v1/embeddings")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


async def test_silence_is_a_lost_replica() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    async with behind(app) as client:
        response = await client.post("/embed")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes"])
async def test_what_load_balancers_ask_of_serve_is_left_alone(path: str) -> None:
    async with behind(serve_says(503, body="DRAINING")) as client:
        assert (await client.get(path)).text == "DRAINING"


async def test_the_applications_own_replies_are_left_alone(service: FakeService) -> None:
    app = edge_app(service)
    app._writes_request_id = False
    async with (
        behind(app) as served,
        httpx.AsyncClient(transport=httpx.ASGITransport(edge_app(service)), base_url="http://edge") as direct,
    ):
        for path, body in (("/embed", {}), ("/embed", {"inputs": "a"}), ("/v1/x", {}), ("/v2/x", {}), ("/info", None)):
            given = [await c.post(path, json=body, headers={"x-request-id": "7"}) for c in (served, direct)]
            assert given[0].status_code == given[1].status_code
            assert given[0].content == given[1].content


async def test_nothing_of_a_stream_is_held_back() -> None:
    sent: asyncio.Queue[Any] = asyncio.Queue()
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await go.wait()
        raise RuntimeError("in the middle")

    stack: Any = _apply_middlewares(app, middlewares())
    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    serving = asyncio.ensure_future(stack(scope, None, sent.put))
    assert (await asyncio.wait_for(sent.get(), 20))["status"] == 200
    assert (await asyncio.wait_for(sent.get(), 20))["body"] == b"data: 1\n\n"
    go.set()
    with pytest.raises(RuntimeError):
        await serving
    assert sent.empty()


async def test_nothing_of_serves_reply_follows_ours() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    stack: Any = _apply_middlewares(serve_says(503), middlewares())
    await stack({"type": "http", "path": "/embed", "method": "POST", "headers": []}, None, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert SECRET.encode() not in sent[1]["body"]

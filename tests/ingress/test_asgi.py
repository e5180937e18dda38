"""The application as a whole: routes, request ids, errors, deadlines, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from starlette.routing import Match

from serve_app import errors
from serve_app.config import IngressSettings
from serve_app.ingress.asgi import create_app
from serve_app.ingress.service import SettingsRef
from tests.ingress.edge import FakeService, client_of, edge_app, served

GOOD = {"inputs": "a"}


async def wait_until_set(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), 20)


async def test_a_request_id_is_made_where_the_client_sends_none(client: httpx.AsyncClient) -> None:
    ids = {(await client.post("/embed", json=GOOD)).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


async def test_the_clients_request_id_is_kept_and_reaches_the_service(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    response = await client.post("/embed", json=GOOD, headers={"x-request-id": "Job-7.line_3"})
    assert response.headers.get_list("x-request-id") == ["Job-7.line_3"]
    assert service.requests[0].id == "Job-7.line_3"


@pytest.mark.parametrize("asked", ["", "a b", "a" * 129, "x;y", "<b>"])
async def test_a_request_id_that_could_do_harm_is_replaced(client: httpx.AsyncClient, asked: str) -> None:
    response = await client.post("/embed", json=GOOD, headers={"x-request-id": asked})
    assert response.headers["x-request-id"] not in ("", asked)


async def test_a_server_that_writes_the_request_id_itself_is_left_to_do_it(service: FakeService) -> None:
    app = create_app(service, SettingsRef(IngressSettings()), writes_request_id=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
        response = await client.post("/embed", json={}, headers={"x-request-id": "abc"})
    assert "x-request-id" not in response.headers
    assert response.json()["request_id"] == "abc"


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("POST", "/models/tiny/nothing", 404, None),
        ("POST", "/models/", 404, None),
        ("POST", "/models/a/b/embed", 404, None),
        ("GET", "/embed", 405, "POST"),
        ("PUT", "/models/tiny/embed", 405, "POST"),
        ("DELETE", "/health", 405, "GET, HEAD"),
        ("OPTIONS", "/", 405, "GET, HEAD, POST"),
    ],
)
async def test_wrong_paths_and_methods_are_told_in_the_envelope(
    client: httpx.AsyncClient, method: str, path: str, status: int, allow: str | None
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.headers.get("allow") == allow
    assert set(response.json()) == {"error", "error_type", "code", "request_id"}


@pytest.mark.parametrize("path", ["/v1/nothing", "/models/tiny/v1/nothing"])
async def test_a_wrong_path_below_v1_is_told_in_openais_envelope(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path, json={})).json()["error"]["code"] == "route_not_found"


async def test_a_slash_at_the_end_changes_nothing(client: httpx.AsyncClient) -> None:
    for path in ("/embed/", "/models/tiny/", "/v1/models/"):
        response = await client.request("GET" if "v1" in path else "POST", path, json=GOOD)
        assert response.status_code == 200


async def test_the_application_may_be_mounted_below_a_root(service: FakeService) -> None:
    transport = httpx.ASGITransport(edge_app(service), root_path="/search")
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        assert (await client.post("/search/models/tiny/embed", json=GOOD)).status_code == 200
        assert (await client.get("/search/")).headers["location"] == "/search/docs"


async def test_one_of_several_models_is_chosen_by_path_or_body() -> None:
    service = FakeService("small", "large")
    async with client_of(service) as client:
        await client.post("/models/large/embed", json=GOOD)
        await client.post("/embed", json={**GOOD, "model": "small"})
        await client.post("/v1/embeddings", json={"input": "a", "model": "large"})
        await client.post("/models/small/v1/embeddings", json={"input": "a", "model": "small"})
    assert [request.model for request in service.requests] == ["large", "small", "large", "small"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/embed", GOOD, 400),
        ("/models/medium/embed", GOOD, 404),
        ("/embed", {**GOOD, "model": "medium"}, 404),
        ("/models/large/embed", {**GOOD, "model": "small"}, 404),
    ],
    ids=["none named", "unknown in the path", "unknown in the body", "path and body differ"],
)
async def test_a_choice_that_cannot_be_made_names_the_models(path: str, body: dict[str, Any], status: int) -> None:
    service = FakeService("small", "large")
    async with client_of(service) as client:
        response = await client.post(path, json=body)
    assert response.status_code == status
    assert "large" in response.json()["error"]
    assert service.requests == []


async def test_an_unexpected_exception_is_logged_and_not_shown(
    client: httpx.AsyncClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.failure = ZeroDivisionError("the internals")
    with caplog.at_level(logging.ERROR):
        response = await client.post("/embed", json=GOOD, headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert "internals" not in response.text
    assert response.json()["request_id"] == "find-me"
    assert "find-me" in caplog.text
    assert "ZeroDivisionError: the internals" in caplog.text


@pytest.mark.parametrize(
    ("failure", "status", "retry_after"),
    [
        (errors.OverloadedError("full", retry_after_s=0.2), 429, "1"),
        (errors.UnavailableError("draining"), 503, "1"),
        (errors.UnavailableError("starting", retry_after_s=12.1), 503, "13"),
        (errors.ModelFailureError("the model failed on this input"), 424, None),
        (errors.InputTooLongError("99 tokens"), 422, None),
    ],
)
async def test_errors_of_the_service_keep_their_message_and_tell_when_to_come_back(
    client: httpx.AsyncClient,
    service: FakeService,
    failure: errors.ServeAppError,
    status: int,
    retry_after: str | None,
) -> None:
    service.failure = failure
    response = await client.post("/embed", json=GOOD)
    assert response.status_code == status
    assert response.json()["error"] == failure.message
    assert response.json()["code"] == failure.code
    assert response.headers.get("retry-after") == retry_after


async def test_an_answer_that_is_not_ready_in_time_is_given_up_and_its_work_cancelled(service: FakeService) -> None:
    service.go.clear()
    async with client_of(service, request_timeout_s=0.05) as client:
        response = await client.post("/embed", json=GOOD)
    assert response.status_code == 504
    assert response.json()["code"] == "deadline_exceeded"
    await wait_until_set(service.cancelled)


async def test_settings_apply_to_the_next_request(service: FakeService) -> None:
    settings = SettingsRef(IngressSettings())
    transport = httpx.ASGITransport(create_app(service, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        assert (await client.post("/embed", json=GOOD)).status_code == 200
        settings.current = IngressSettings(max_body_bytes=3)
        assert (await client.post("/embed", json=GOOD)).status_code == 413


async def test_a_client_that_leaves_cancels_the_work(service: FakeService) -> None:
    service.go.clear()
    async with served(edge_app(service)) as (host, port):
        _, writer = await asyncio.open_connection(host, port)
        body = b'{"inputs":"a"}'
        writer.write(b"POST /embed HTTP/1.1\r\nhost: edge\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await wait_until_set(service.started)
        writer.close()
        await wait_until_set(service.cancelled)


async def test_cancelling_the_application_cancels_the_work(service: FakeService) -> None:
    service.go.clear()
    async with client_of(service) as client:
        posting = asyncio.ensure_future(client.post("/embed", json=GOOD))
        await wait_until_set(service.started)
        posting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await posting
    await wait_until_set(service.cancelled)


async def test_work_that_fails_after_its_client_left_is_not_reported_as_lost(service: FakeService) -> None:
    """Else every client that leaves would put a traceback into the log when its garbage is collected."""
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))

    async def fails_when_cancelled(request: object) -> Any:
        service.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            service.cancelled.set()
            raise errors.UnavailableError("a replica was lost meanwhile")

    service.answer = fails_when_cancelled  # type: ignore[method-assign]
    async with client_of(service, request_timeout_s=0.05) as client:
        assert (await client.post("/embed", json=GOOD)).status_code == 504
    await wait_until_set(service.cancelled)
    await asyncio.sleep(0)
    assert lost == []


async def test_head_is_get_without_a_body(service: FakeService) -> None:
    async with served(edge_app(service)) as (host, port), httpx.AsyncClient() as client:
        response = await client.head(f"http://{host}:{port}/health")
    assert response.status_code == 200
    assert response.content == b""
    assert int(response.headers["content-length"]) > 0


async def test_a_websocket_is_refused(service: FakeService) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await edge_app(service)({"type": "websocket", "path": "/embed"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_routes_can_be_told_by_name_as_ray_serve_does(service: FakeService) -> None:
    app = edge_app(service)
    for method, path, pattern in [
        ("POST", "/embed", "/embed"),
        ("POST", "/models/tiny/embed", "/models/{name}/embed"),
        ("POST", "/models/tiny", "/models/{name}"),
        ("GET", "/v1/models/tiny", "/v1/models/{name}"),
        ("POST", "/", "/"),
    ]:
        scope = {"type": "http", "method": method, "path": path}
        assert [route.path for route in app.routes if route.matches(scope)[0] is Match.FULL] == [pattern]
    assert all(
        route.matches({"type": "http", "method": "GET", "path": "/x/y"})[0] is Match.NONE for route in app.routes
    )


async def test_requests_beyond_the_limit_of_those_under_way_are_refused_before_their_body_is_read(
    service: FakeService,
) -> None:
    service.go.clear()
    async with client_of(service, max_concurrent_requests=2) as client:
        held = [asyncio.ensure_future(client.post("/embed", json=GOOD)) for _ in range(2)]
        while len(service.requests) < 2:
            await asyncio.sleep(0)
        refused = await client.post("/v1/embeddings", content=b"{")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await client.get("/health")).status_code == 200
        service.go.set()
        assert [response.status_code for response in await asyncio.gather(*held)] == [200, 200]
        assert (await client.post("/embed", json=GOOD)).status_code == 200

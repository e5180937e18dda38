"""Headers by which a client would steer Ray Serve reach neither Serve nor the application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve._private.http_util import (
    RequestIdMiddleware,
    parse_disconnect_disabled_header,
    parse_request_timeout_header,
    validate_http_proxy_callback_return,
)

from serve_app.ingress.door import REQUEST_ID
from serve_app.ingress.front import Front, middlewares
from tests.ingress.edge import FakeService, edge_app, served
from tests.ingress.test_body import Connection

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


class Serve:
    """What Serve makes of the headers that get through; then the application."""

    def __init__(self, service: FakeService) -> None:
        self.headers: dict[bytes, bytes] = {}
        self._app = edge_app(service)
        self._app._writes_request_id = False
        self.front = Front(RequestIdMiddleware(self))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = dict(scope["headers"])
        for name in (b"x-request-id", b"x-session-id", b"serve_multiplexed_model_id"):
            self.headers.get(name, b"").decode()
        await self._app(scope, receive, send)


@pytest.fixture
def serve(service: FakeService) -> Serve:
    return Serve(service)


async def post(serve: Serve, headers: list[tuple[bytes, bytes]]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(serve.front), base_url="http://edge") as client:
        return await client.post("/embed", json={"inputs": "a"}, headers=headers)


@pytest.mark.parametrize("value", [b"0", b"-1", b"1e9", b"nan", b"5", b"\xff"])
async def test_no_client_sets_serves_timeout(serve: Serve, value: bytes) -> None:
    response = await post(serve, [(b"X-Request-Timeout-Seconds", value)])
    assert response.status_code == 200
    assert parse_request_timeout_header(serve.headers, 61.0) == 61.0


@pytest.mark.parametrize("name", [b"x-request-disconnect-disabled", b"X-Request-Disconnect-Disabled"])
async def test_no_client_turns_cancellation_off(serve: Serve, name: bytes) -> None:
    await post(serve, [(name, b"?1"), (name, b"?1")])
    assert not parse_disconnect_disabled_header(serve.headers)


@pytest.mark.parametrize("name", [b"x-session-id", b"serve_multiplexed_model_id", b"x-request-id"])
async def test_bytes_that_serve_cannot_decode_do_not_reach_it(serve: Serve, name: bytes) -> None:
    assert (await post(serve, [(name, b"\xff\xfe")])).status_code == 200


@pytest.mark.parametrize("asked", [b"", b"a b", b"a" * 129, b"<script>", b"\xc3\xa9", b'"}{"'])
async def test_a_request_id_that_could_do_harm_is_never_sent_back(serve: Serve, asked: bytes) -> None:
    response = await post(serve, [(b"x-request-id", asked)])
    (told,) = [value for name, value in response.headers.raw if name.lower() == b"x-request-id"]
    assert told != asked
    assert REQUEST_ID.fullmatch(told)


async def test_of_several_request_ids_none_is_believed(serve: Serve, service: FakeService) -> None:
    response = await post(serve, [(b"x-request-id", b"one"), (b"x-request-id", b"two")])
    assert response.headers.get_list("x-request-id") == [service.requests[0].id]
    assert service.requests[0].id not in ("one", "two")


async def test_a_good_request_id_is_kept(serve: Serve, service: FakeService) -> None:
    response = await post(serve, [(b"x-request-id", b"Job-7.line_3")])
    assert response.headers.get_list("x-request-id") == ["Job-7.line_3"] == [service.requests[0].id]


async def test_header_and_body_tell_the_same_id_where_the_client_sent_none(service: FakeService) -> None:
    serve = Serve(service)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(serve.front), base_url="http://edge") as client:
        response = await client.post("/embed", json={})
    assert response.json()["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("framing", ["content-length: 14", "transfer-encoding: chunked"])
async def test_a_body_that_an_upgrade_takes_away_is_refused_in_words(service: FakeService, framing: str) -> None:
    async with served(Front(edge_app(service))) as address:
        connection = await Connection.open(address)
        await connection.head("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAM", framing)
        await connection.send(b'{"inputs":"a"}')
        response = await connection.response()
        assert response.status == 400
        assert "leave that header out" in response.json()["error"]
        assert await connection.is_closed_by_the_server()


async def test_an_upgrade_without_a_body_is_not_looked_at(serve: Serve) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(serve.front), base_url="http://edge") as client:
        assert (await client.get("/health", headers={"upgrade": "h2c", "connection": "Upgrade"})).status_code == 200


def test_the_configuration_names_it_and_serve_takes_it() -> None:
    variables = yaml.safe_load(CONFIG.read_text())["controller_options"]["runtime_env"]["env_vars"]
    named = import_attr(variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
    assert named is middlewares
    assert [each.cls for each in validate_http_proxy_callback_return(named())] == [Front]

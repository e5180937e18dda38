"""Whom a server on a loopback address answers.

Serve binds gRPC to every address, and HTTP is reached by pages in a browser on this machine too.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import httpx
import pytest

from serve_app.config import ApiKeysConfig, IngressSettings, parse
from serve_app.errors import ConfigError, ForbiddenError
from serve_app.ingress.access import Guard
from serve_app.ingress.asgi import create_app
from serve_app.ingress.door import Door
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.reach import check_host, check_peer, is_loopback, serves_this_machine_alone
from serve_app.ingress.service import SettingsRef
from tests.ingress.edge import FakeService
from tests.ingress.test_keys import line
from tests.ingress.test_protocols_open_inference import Context, Servicer, request_of, stream_of

HERE = ["ipv4:127.0.0.1:52000", "ipv6:%5B::1%5D:52000", "ipv6:[::1]:52000", "ipv6:[::ffff:127.0.0.1]:5", "unix:/x"]
ELSEWHERE = ["ipv4:10.0.0.7:52000", "ipv6:%5Bfe80::1%5D:52000", "ipv6:[::ffff:10.0.0.7]:5", "", "ipv4:", "127.0.0.1"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_a_loopback_address_means_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "::ffff:10.1.2.3", "example.org", ""])
def test_any_other_may_mean_more(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("peer", HERE)
def test_callers_of_this_machine_are_known(peer: str) -> None:
    check_peer(peer)


@pytest.mark.parametrize("peer", ELSEWHERE)
def test_callers_from_elsewhere_are_refused(peer: str) -> None:
    with pytest.raises(ForbiddenError):
        check_peer(peer)


class From(Context):
    """A call of a peer."""

    def __init__(self, peer: str) -> None:
        super().__init__()
        self._peer = peer

    def peer(self) -> str:
        return self._peer


@pytest.mark.parametrize("local_only", [False, True])
async def test_a_server_of_this_machine_alone_answers_nothing_to_others(service: FakeService, local_only: bool) -> None:
    servicer = Servicer(service)
    servicer.open_inference.local_only = local_only
    near, far = From(HERE[0]), From(ELSEWHERE[0])
    for context in (near, far):
        await servicer.ModelInfer(request_of("a"), context)
    assert near.code is grpc.StatusCode.OK
    assert far.code is (grpc.StatusCode.PERMISSION_DENIED if local_only else grpc.StatusCode.OK)
    assert len(service.requests) == (1 if local_only else 2)
    await servicer.ServerLive(messages.ServerLiveRequest(), far)
    far = From(ELSEWHERE[0])
    streamed = [each async for each in servicer.ModelStreamInfer(stream_of(request_of("a")), far)]
    assert (len(streamed), far.code) == ((0, grpc.StatusCode.PERMISSION_DENIED) if local_only else (1, near.code))


def test_without_a_serve_nothing_is_known() -> None:
    assert not serves_this_machine_alone()


OWN_NAMES = [
    "localhost",
    "LocalHost:8000",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.9.9.9:1",
    "[::1]",
    "[::1]:8000",
]
OTHER_NAMES = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example:8000",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
    "evil.example.",
    "0.0.0.0:8000",
    "192.168.1.7",
    "[fe80::1]:8000",
    "[::]",
    "::1",
    ":8000",
    " ",
    "\xe9",
]


class Rebound:
    """The edge of a server on a loopback address, as a page sees it whose own name leads there."""

    def __init__(self, service: FakeService, guard: Guard | None = None, allowed: tuple[str, ...] = ()) -> None:
        door = Door(guard)
        door.local_only = True
        self.app = create_app(service, SettingsRef(IngressSettings(allowed_hosts=allowed)), door=door)

    async def ask(self, method: str, path: str, host: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            content = (b'{"input": "a"}' if "/v1/" in path else b'{"inputs": "a"}') if method == "POST" else None
            headers = {b"host": host.encode("latin-1"), b"content-type": b"application/json"}
            return await client.request(method, path, headers=headers, content=content)


@pytest.mark.parametrize("host", OWN_NAMES)
async def test_a_request_that_names_this_machine_is_answered(service: FakeService, host: str) -> None:
    assert (await Rebound(service).ask("POST", "/embed", host)).status_code == 200


@pytest.mark.parametrize("host", OTHER_NAMES)
async def test_a_request_that_names_another_is_refused_before_anything_is_done(service: FakeService, host: str) -> None:
    for method, path in (("POST", "/embed"), ("POST", "/v1/embeddings"), ("GET", "/info"), ("GET", "/metrics")):
        response = await Rebound(service).ask(method, path, host)
        assert response.status_code == 403, path
        told = response.json().get("error")
        told = told["message"] if isinstance(told, dict) else told
        assert "list the name in allowed_hosts" in told
        assert "evil" not in response.text
    assert service.requests == []


async def test_probes_and_documentation_are_answered_under_every_name(service: FakeService) -> None:
    """Exactly what is answered without a key where keys are asked."""
    rebound = Rebound(service)
    answered = set()
    for route in rebound.app.routes:
        response = await rebound.ask(route.method, route.path.replace("{name}", "tiny"), "evil.example")
        if response.status_code != 403:
            answered.add(route.path)
    assert answered == {route.path for route in rebound.app.routes if route.role is None}
    assert {"/health", "/ping", "/ready"} <= answered


async def test_a_configured_name_is_answered_on_any_port(service: FakeService) -> None:
    rebound = Rebound(service, allowed=("api.example.org", "Box"))
    for host in ("api.example.org", "API.example.org:443", "box", "localhost"):
        assert (await rebound.ask("POST", "/embed", host)).status_code == 200
    assert (await rebound.ask("POST", "/embed", "www.example.org")).status_code == 403


async def test_where_keys_are_asked_any_name_is_answered(service: FakeService, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line("alice", "secret"))
    guard = Guard(KeyRing(ApiKeysConfig(file=str(tmp_path / "keys"))))
    response = await Rebound(service, guard).ask("POST", "/embed", "api.example.org")
    assert response.json()["code"] == "unauthorized"


async def test_a_server_that_others_reach_answers_any_name(client: httpx.AsyncClient) -> None:
    assert (await client.post("/embed", json={"inputs": "a"}, headers={"host": "api.example.org"})).status_code == 200


def test_a_request_without_a_name_is_no_browsers() -> None:
    check_host(b"", ())


@pytest.mark.parametrize("name", ["http://box", "box:8000", "", "a b", "[::1]"])
def test_what_is_no_name_of_a_host_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed_hosts\[0\]"):
        parse(IngressSettings, {"allowed_hosts": [name]}, "user_config")

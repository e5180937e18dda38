"""Who may ask what, and how much, through the whole edge."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve_app.config import ApiKeysConfig, IngressSettings
from serve_app.errors import (
    BatchTooLargeError,
    InputTooLongError,
    ModelFailureError,
    OverloadedError,
    ServeAppError,
)
from serve_app.ingress.access import Bucket, Guard
from serve_app.ingress.asgi import App, create_app
from serve_app.ingress.door import Door
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.protocols.open_inference import unsupported
from serve_app.ingress.service import SettingsRef
from tests.ingress.edge import TOKENS, WORDS, FakeService
from tests.ingress.test_counting import Call
from tests.ingress.test_keys import Clock, line
from tests.ingress.test_openapi import example_of
from tests.ingress.tiers import Tiers, ingress_of
from tests.inprocess import in_a_replica

SECRET = "sa_the-secret-of-alice"
GOOD = {"inputs": "a"}
ALICE = {"authorization": f"Bearer {SECRET}"}


class Guarded:
    """An edge that asks for keys, and its clock."""

    def __init__(self, service: FakeService, file: Path, *lines: str) -> None:
        file.write_text("\n".join(lines or [line("alice", SECRET)]))
        self.clock = Clock()
        door = Door(Guard(KeyRing(ApiKeysConfig(file=str(file)), self.clock), self.clock))
        self.app: App = create_app(service, SettingsRef(IngressSettings()), door=door)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://edge")

    async def status(self, path: str = "/embed", headers: dict[str, str] | None = None) -> int:
        return (await self.client.post(path, json=GOOD, headers=ALICE if headers is None else headers)).status_code

    def tokens_left(self) -> float:
        account = self.app._door.guard._accounts["alice"]  # type: ignore[union-attr]
        assert account.tokens is not None
        return account.tokens._level


@pytest.fixture
def guarded(service: FakeService, tmp_path: Path) -> Guarded:
    return Guarded(service, tmp_path / "keys")


@pytest.mark.parametrize("headers", [ALICE, {"x-api-key": SECRET}, {"Authorization": f"bearer {SECRET}"}])
async def test_a_known_key_opens_the_door(guarded: Guarded, headers: dict[str, str]) -> None:
    assert await guarded.status(headers=headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": SECRET + "x"},
        {"x-api-key": SECRET[:-1]},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": SECRET},
    ],
)
@pytest.mark.parametrize(("path", "inner"), [("/embed", None), ("/v1/embeddings", "error")])
async def test_no_key_and_a_wrong_key_are_a_401_in_the_shape_of_the_protocol(
    guarded: Guarded,
    service: FakeService,
    caplog: pytest.LogCaptureFixture,
    headers: dict[str, str],
    path: str,
    inner: str,
) -> None:
    with caplog.at_level(logging.DEBUG):
        response = await guarded.client.post(path, json={"input" if "/v1/" in path else "inputs": "a"}, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    told = response.json()[inner] if inner else response.json()
    assert told["code"] == "unauthorized"
    assert SECRET[:-1] not in response.text + caplog.text
    assert service.requests == []


def routes_of(app: App) -> Iterator[tuple[str, str, str | None]]:
    for route in app.routes:
        yield route.method, route.path.replace("{name}", "tiny"), route.role


async def test_every_route_but_documentation_and_health_asks_for_a_key(guarded: Guarded) -> None:
    opened = set()
    for method, path, _ in routes_of(guarded.app):
        response = await guarded.client.request(method, path, json=GOOD if method == "POST" else None)
        if response.status_code != 401:
            opened.add(path)
    pages = {"/", "/docs", "/docs/docs.css", "/docs/docs.js", "/openapi.json"}
    health = {"/health", "/ping", "/ready", "/models/tiny/health", "/v2/health/live", "/v2/health/ready"}
    inference = {"/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready"}
    assert opened == pages | health | inference


async def test_metrics_and_admin_routes_have_keys_of_their_own(service: FakeService, tmp_path: Path) -> None:
    lines = [line("alice", SECRET), line("prometheus", "p", "roles=metrics"), line("root", "r", "roles=admin")]
    guarded = Guarded(service, tmp_path / "keys", *lines)
    secrets = {"inference": SECRET, "metrics": "p", "admin": "r"}
    refused = {route.path.replace("{name}", "tiny") for route in unsupported.routes()}
    for method, path, wanted in routes_of(guarded.app):
        if path in refused:
            continue
        for role, secret in secrets.items():
            content = json.dumps(example_of(path.replace("tiny", "{name}"))) if method == "POST" else None
            response = await guarded.client.request(method, path, content=content, headers={"x-api-key": secret})
            if wanted in (None, role):
                assert response.status_code in (200, 307), path
            else:
                assert response.status_code == 403
                assert response.json().get("error")
                assert secret not in response.json()


async def test_a_key_is_taken_away_without_a_restart(guarded: Guarded, tmp_path: Path) -> None:
    assert await guarded.status() == 200
    (tmp_path / "keys").write_text(line("somebody-else", "s"))
    guarded.clock.now += 5
    assert await guarded.status() == 401


async def test_requests_beyond_the_quota_are_429_until_time_has_passed(service: FakeService, tmp_path: Path) -> None:
    lines = [line("alice", SECRET, "requests_per_minute=3"), line("bob", "b")]
    guarded = Guarded(service, tmp_path / "keys", *lines)
    assert [await guarded.status() for _ in range(4)] == [200, 200, 200, 429]
    assert await guarded.status(headers={"x-api-key": "b"}) == 200
    response = await guarded.client.post("/embed", json=GOOD, headers=ALICE)
    assert response.json()["code"] == "quota_exceeded"
    assert response.headers["retry-after"] == "20"
    guarded.clock.now += 20
    assert [await guarded.status() for _ in range(2)] == [200, 429]


async def test_requests_of_a_bulk_key_let_others_go_first_whatever_they_ask(
    service: FakeService, tmp_path: Path
) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "priority=bulk"), line("bob", "b"))
    for headers in (ALICE, {**ALICE, "x-priority": "interactive"}, {"x-api-key": "b"}):
        assert await guarded.status(headers=headers) == 200
    assert [request.priority for request in service.requests] == ["bulk", "bulk", "interactive"]


async def test_tokens_are_counted_when_they_are_known_and_debts_are_paid_first(
    service: FakeService, tmp_path: Path
) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    response = await guarded.client.post("/embed", json={"inputs": "x" * 98}, headers=ALICE)
    assert response.headers["x-compute-tokens"] == "100"
    assert await guarded.status() == 429
    guarded.clock.now += 39
    assert await guarded.status() == 429
    guarded.clock.now += 2
    assert await guarded.status() == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_generated_tokens_count_too(tmp_path: Path, stream: bool) -> None:
    service = FakeService(task="text-generation")
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    body = {"prompt": "x" * 4, "stream": stream}
    assert (await guarded.client.post("/v1/completions", json=body, headers=ALICE)).status_code == 200
    assert guarded.tokens_left() == 60 - 6 - len(WORDS if not stream else (*TOKENS, "end"))


async def test_what_is_refused_costs_no_tokens(service: FakeService, tmp_path: Path) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=1"))
    for _ in range(3):
        assert (await guarded.client.post("/embed", json={"inputs": []}, headers=ALICE)).status_code == 400
    assert await guarded.status() == 200


HURRIED = {**ALICE, "x-request-timeout-ms": "20"}


async def test_what_ran_out_of_time_is_charged_as_estimated(service: FakeService, tmp_path: Path) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    service.go.clear()
    response = await guarded.client.post("/embed", json={"inputs": "x" * 70}, headers=HURRIED)
    assert response.status_code == 504
    service.go.set()
    assert guarded.tokens_left() == -10
    assert await guarded.status() == 429


async def test_what_is_under_way_is_charged_already(service: FakeService, tmp_path: Path) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    service.go.clear()
    asking = asyncio.ensure_future(guarded.client.post("/embed", json={"inputs": "x" * 70}, headers=ALICE))
    await service.started.wait()
    assert await guarded.status() == 429
    service.go.set()
    assert (await asking).status_code == 200
    assert guarded.tokens_left() == 60 - 72


@pytest.mark.parametrize("failure", [OverloadedError("full"), InputTooLongError("long")])
async def test_what_the_service_refuses_is_given_back(
    service: FakeService, tmp_path: Path, failure: ServeAppError
) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    service.failure = failure
    assert (await guarded.client.post("/embed", json={"inputs": "x" * 70}, headers=ALICE)).status_code >= 400
    assert guarded.tokens_left() == 60


@pytest.mark.parametrize("failure", [BatchTooLargeError("large"), ModelFailureError("late"), ZeroDivisionError()])
async def test_what_was_computed_is_charged_whatever_is_answered(
    service: FakeService, tmp_path: Path, failure: Exception
) -> None:
    """70 characters are estimated as 70 tokens here, and cost 72."""
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=200"))
    service.late_failure = failure
    body = {"inputs": "x" * 70}
    statuses = [(await guarded.client.post("/embed", json=body, headers=ALICE)).status_code for _ in range(4)]
    assert [status >= 400 for status in statuses] == [True] * 4
    assert statuses[3] == 429
    assert guarded.tokens_left() == 200 - 3 * 72


async def test_a_quota_ends_answers_that_are_computed_and_then_refused(tmp_path: Path) -> None:
    """Through the ingress itself: 100 texts of one token each, whose vectors together are too large an answer."""
    with in_a_replica():
        ingress = await ingress_of(Tiers(), max_answer_bytes=3000)
        guarded = Guarded(FakeService(), tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=200"))
        ingress._door.guard = guarded.app._door.guard
        transport = httpx.ASGITransport(ingress.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            body = {"inputs": ["a"] * 100}
            codes = [(await client.post("/embed_all", json=body, headers=ALICE)).json()["code"] for _ in range(4)]
    assert codes == ["batch_too_large", "batch_too_large", "quota_exceeded", "quota_exceeded"]


async def test_a_stream_that_is_left_costs_what_had_come(service: FakeService, tmp_path: Path) -> None:
    """A prompt of 6 tokens and the first new one, of the 50 that were estimated."""
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    service.task = "text-generation"
    service.go.clear()
    call = Call("/v1/completions", json.dumps({"prompt": "x" * 50, "stream": True}).encode(), ALICE)
    answering = asyncio.create_task(guarded.app(call.scope(), call.receive, call.send))
    await call.answered.wait()
    assert guarded.tokens_left() == 60 - 50
    call.left.set()
    await answering
    assert guarded.tokens_left() == 60 - 7


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [("/tokenize", {"inputs": ["abc", "de"]}, 3 + 2 + 2), ("/decode", {"ids": [[5, 6], [7]]}, 3)],
)
async def test_tokens_of_texts_and_texts_of_tokens_count_too(
    service: FakeService, tmp_path: Path, path: str, body: dict[str, object], tokens: int
) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "tokens_per_minute=60"))
    assert (await guarded.client.post(path, json=body, headers=ALICE)).status_code == 200
    assert guarded.tokens_left() == 60 - tokens


def test_a_bucket_fills_no_higher_than_a_minutes_worth() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    clock.now += 3600
    bucket.spend(60)
    assert bucket.wait_s(1) == pytest.approx(1.0)


async def test_a_changed_line_keeps_what_is_left_of_a_quota_that_did_not_change(
    service: FakeService, tmp_path: Path
) -> None:
    guarded = Guarded(service, tmp_path / "keys", line("alice", SECRET, "requests_per_minute=2"))
    assert [await guarded.status() for _ in range(2)] == [200, 200]
    (tmp_path / "keys").write_text(line("alice", SECRET, "roles=inference,metrics", "requests_per_minute=2"))
    guarded.clock.now += 2
    assert await guarded.status() == 429

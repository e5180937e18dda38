"""The edge as Ray Serve runs it, with HAProxy: what clients cannot steer, keys, deadlines, the request log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.ingress.keys import Key, digest_of
from tests.live import Live, served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SECRET = "sa_secret-of-alice"
GOOD = {"inputs": "a"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def live(keys: Path) -> Iterator[Live]:
    keys.write_text(Key("alice", digest_of(SECRET.encode())).line)

    def change(config: dict[str, Any]) -> None:
        application = config["applications"][0]
        application["args"]["api_keys"] = {"file": str(keys)}
        application["deployments"][0]["user_config"]["log_requests"] = True

    with served(change) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {SECRET}"}
    with httpx.Client(base_url=live.base_url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {b"x-request-timeout-seconds": b"0.000001"},
        {b"x-request-timeout-seconds": b"\xff"},
        {b"x-request-disconnect-disabled": b"\xff"},
        {b"x-session-id": b"\xff"},
        {b"serve_multiplexed_model_id": b"\xff"},
    ],
)
def test_headers_that_serve_would_act_on_do_nothing(client: httpx.Client, headers: dict[bytes, bytes]) -> None:
    assert client.post("/embed", json=GOOD, headers=list(headers.items())).status_code == 200


@pytest.mark.parametrize("asked", [b"<b>", b"a b", b"a" * 500, b"\xff"])
def test_a_bad_request_id_is_not_sent_back(client: httpx.Client, asked: bytes) -> None:
    response = client.post("/embed", json={}, headers=[(b"x-request-id", asked)])
    (told,) = response.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", told)
    assert response.json()["request_id"] == told


def test_a_good_request_id_is_kept(client: httpx.Client) -> None:
    response = client.post("/embed", json={}, headers={"x-request-id": "Job-7"})
    assert (response.headers["x-request-id"], response.json()["request_id"]) == ("Job-7", "Job-7")


def test_without_a_key_there_is_no_answer_and_a_metrics_key_is_another(client: httpx.Client) -> None:
    assert client.post("/embed", json=GOOD, headers={"authorization": "Bearer x"}).status_code == 401
    assert client.get("/metrics").status_code == 403


def test_a_deadline_that_nobody_can_keep_is_a_504(client: httpx.Client) -> None:
    many = {"inputs": ["word " * 200] * 500}
    assert client.post("/embed", json=many, headers={"x-request-timeout-ms": "20"}).status_code == 504
    assert client.post("/embed", json=GOOD).status_code == 200


def output_of_replicas(live: Live) -> str:
    """What Ray keeps of every worker's standard output."""
    return "".join(file.read_text(errors="replace") for file in live.folder.rglob("worker-*.out"))


def test_every_request_has_a_line_of_json(client: httpx.Client, live: Live) -> None:
    client.post("/embed", json={"inputs": "not to be seen"}, headers={"x-request-id": "find-this-line"})
    give_up = time.monotonic() + 30
    while "find-this-line" not in (log := output_of_replicas(live)) and time.monotonic() < give_up:
        time.sleep(0.1)
    (line,) = [line for line in log.splitlines() if "find-this-line" in line]
    entry = json.loads(line)
    assert (entry["status"], entry["key"], entry["route"]) == (200, "alice", "/embed")
    assert entry["tokens"] == 6
    for told in (log, live.log):
        assert "not to be seen" not in told
        assert SECRET not in told


def test_a_changed_list_of_keys_applies_while_the_server_runs(client: httpx.Client, keys: Path) -> None:
    before = keys.read_text()
    keys.write_text(Key("bob", digest_of(b"another")).line)
    give_up = time.monotonic() + 60
    while client.post("/embed", json=GOOD).status_code != 401 and time.monotonic() < give_up:
        time.sleep(0.1)
    assert client.post("/embed", json=GOOD, headers={"authorization": "Bearer another"}).status_code == 200
    keys.write_text(before)

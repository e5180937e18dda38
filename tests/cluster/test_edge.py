"""The edge as Ray Serve runs it, with HAProxy: what clients cannot steer, keys, deadlines, the request log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from socket import AF_INET
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml

from serve_app.ingress.keys import Key, digest_of
from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.reach import is_loopback
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


def line_of(live: Live, request_id: str) -> str:
    """The line of the log, as soon as it is there."""
    give_up = time.monotonic() + 30
    while request_id not in (log := output_of_replicas(live)) and time.monotonic() < give_up:
        time.sleep(0.1)
    (line,) = [line for line in log.splitlines() if request_id in line]
    return line


def test_every_request_has_a_line_of_json(client: httpx.Client, live: Live) -> None:
    client.post("/embed", json={"inputs": "not to be seen"}, headers={"x-request-id": "find-this-line"})
    entry = json.loads(line_of(live, "find-this-line"))
    assert (entry["status"], entry["key"], entry["route"]) == (200, "alice", "/embed")
    assert entry["tokens"] == 6
    for told in (output_of_replicas(live), live.log):
        assert "not to be seen" not in told
        assert SECRET not in told


def infer(address: str, **metadata: str) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Status and trailing metadata of a call."""
    asked = messages.ModelInferRequest(raw_input_contents=[b"\1\0\0\0a"])
    asked.inputs.add(name="text", datatype="BYTES", shape=[1])
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer", lambda message: message.SerializeToString())
        try:
            _, done = call.with_call(asked, timeout=30, metadata=tuple(metadata.items()))
        except grpc.RpcError as error:
            done = error
        return done.code(), dict(done.trailing_metadata())


def test_a_grpc_call_is_told_and_logged_as_a_request_is(live: Live) -> None:
    status, told = infer(live.grpc_address, **{"x-api-key": SECRET, "x-request-id": "find-this-call"})
    assert status is grpc.StatusCode.OK
    assert (told["x-request-id"], told["x-compute-tokens"]) == ("find-this-call", "3")
    entry = json.loads(line_of(live, "find-this-call"))
    assert (entry["method"], entry["status"], entry["key"], entry["tokens"]) == ("gRPC", 200, "alice", 3)


def test_a_grpc_call_without_a_key_is_refused_with_its_request_id(live: Live) -> None:
    status, told = infer(live.grpc_address)
    assert status is grpc.StatusCode.UNAUTHENTICATED
    assert re.fullmatch("[0-9a-f]{32}", told["x-request-id"])


def replicas(live: Live) -> list[psutil.Process]:
    """Processes of the ingress."""
    return [process for process in live.processes() if process.name().startswith("ray::ServeReplica:serve_app:in")]


def test_grpc_ports_that_serve_opens_to_all_answer_this_machine_alone(live: Live) -> None:
    config = yaml.safe_load((live.folder / "serve_config.yaml").read_text())
    environment = config["controller_options"]["runtime_env"]["env_vars"]
    first, last = (int(environment[f"RAY_SERVE_DIRECT_INGRESS_{end}_GRPC_PORT"]) for end in ("MIN", "MAX"))
    (replica,) = replicas(live)
    listening = [each.laddr.port for each in replica.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    (port,) = [each for each in listening if first <= each <= last]
    addresses = [each.address for some in psutil.net_if_addrs().values() for each in some if each.family == AF_INET]
    assert infer(f"127.0.0.1:{port}", **{"x-api-key": SECRET})[0] is grpc.StatusCode.OK
    for address in addresses:
        if not is_loopback(address):
            status, _ = infer(f"{address}:{port}", **{"x-api-key": SECRET})
            assert status is grpc.StatusCode.PERMISSION_DENIED


def test_a_changed_list_of_keys_applies_while_the_server_runs(client: httpx.Client, keys: Path) -> None:
    before = keys.read_text()
    keys.write_text(Key("bob", digest_of(b"another")).line)
    give_up = time.monotonic() + 60
    while client.post("/embed", json=GOOD).status_code != 401 and time.monotonic() < give_up:
        time.sleep(0.1)
    assert client.post("/embed", json=GOOD, headers={"authorization": "Bearer another"}).status_code == 200
    keys.write_text(before)


def test_whatever_is_answered_while_the_ingress_is_lost_has_our_shape(client: httpx.Client, live: Live) -> None:
    (lost,) = replicas(live)
    lost.kill()
    give_up = time.monotonic() + 90
    answered = False
    while not answered and time.monotonic() < give_up:
        try:
            response = client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-timeout-ms": "5000"})
        except httpx.RemoteProtocolError:
            continue  # HAProxy closes a connection whose replica is lost, so that the client sends again
        told = response.json()
        answered = response.status_code == 200
        assert answered or told["error"]
        if not answered and "x-request-id" in response.headers:  # HAProxy's own reply has no id, and one shape for all
            assert told["error"]["code"] in ("unavailable", "internal", "deadline_exceeded")
    assert answered

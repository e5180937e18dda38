"""`serve-app serve` where it is not easy: beside another server, behind a proxy, with few files, for a user of no home.

The servers here have the ports and files that `serve-app serve` chooses, and only what README tells to change.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
import yaml

from serve_app.ingress.reach import is_loopback
from tests.cluster.hosts import OTHER_USER, as_other_user
from tests.hub.models import write_tiny_bert
from tests.hub.server import LocalHub
from tests.live import (
    PROGRAMS,
    ROOT,
    SERVE_APP_SERVE,
    Live,
    free_port,
    models_of,
    own_folder,
    started,
    wait_until_ready,
)
from tests.proxy import OUTSIDE, Proxy, through_proxy

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

START_TIMEOUT_S = 400
REPO = "tiny-org/tiny-bert"
FEW_FILES = ("prlimit", "--nofile=4096:4096")


def named(name: str, root: str, **model: Any) -> dict[str, Any]:
    """serve_config.yaml with two ports, the name of its model and its cache changed, and one small model replica."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"], config["grpc_options"]["port"] = free_port(), free_port()
    # Serve begins anew with a proxy that is not there in time, and `serve run` then ends: a busy machine needs longer.
    config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    (served,) = models_of(config)
    usual = served["name"]
    served |= {"name": name, **model}
    for application in config["applications"]:
        application["name"] = application["name"].replace(usual, name)
        application["args"]["cache"] = {"root": root}
        for entry in application["deployments"]:
            entry["name"] = entry["name"].replace(usual, name)
            entry["ray_actor_options"]["num_cpus"] = 0.1
            entry["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def proxy(model: Path) -> Iterator[Proxy]:
    """The only way to the hub that has the model."""
    with LocalHub() as hub:
        hub.add(REPO, model, revision="a" * 40)
        with Proxy(hub.endpoint.removeprefix("http://")).running() as proxy:
            yield proxy


@pytest.fixture(scope="module")
def first(proxy: Proxy) -> Iterator[Live]:
    """A server with few files and a model of the Hub, on a machine that reaches the outside through a proxy."""
    environment = {**through_proxy(proxy.url), "HF_ENDPOINT": f"http://{OUTSIDE}"}
    with own_folder() as folder:
        config = named("first", str(folder / "models"), source=REPO, revision="a" * 40)
        with started(folder, config, environment, (*FEW_FILES, *SERVE_APP_SERVE)) as live:
            wait_until_ready(live, START_TIMEOUT_S)
            yield live


def embed(base_url: str) -> Any:
    answer = httpx.post(f"{base_url}/embed", json={"inputs": "hello"}, timeout=60)
    return answer.raise_for_status().json()


def test_a_server_behind_a_proxy_answers_over_http_and_grpc(first: Live) -> None:
    text = triton.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hello"], object))
    client = triton.InferenceServerClient(first.grpc_address)
    try:
        vectors = client.infer("first", [text], parameters={"normalize": True}).as_numpy("embedding")
    finally:
        client.close()
    np.testing.assert_allclose(vectors, embed(first.base_url), atol=1e-5)


def test_metrics_of_the_whole_server_are_told_behind_a_proxy(first: Live) -> None:
    embed(first.base_url)
    deadline = time.monotonic() + 60  # replicas report every few seconds
    while "ray_serve_app_requests_total{" not in httpx.get(f"{first.base_url}/metrics", timeout=60).text:
        assert time.monotonic() < deadline
        time.sleep(1)


def test_the_proxy_is_asked_for_models_and_for_nothing_else(first: Live, proxy: Proxy) -> None:
    embed(first.base_url)
    assert [asked for asked in proxy.asked if asked.endswith("/model.safetensors")]
    assert proxy.asked_of_others() == []


def test_with_few_files_haproxy_takes_fewer_connections(first: Live) -> None:
    assert "HAProxy takes 1,536 connections of clients at once" in first.log
    (haproxy,) = (process for process in first.processes() if process.name() == "haproxy")
    configuration = Path(haproxy.cmdline()[haproxy.cmdline().index("-f") + 1])
    assert re.search(r"^\s*maxconn 1536$", configuration.read_text(), re.MULTILINE)


def open_ports(live: Live) -> Iterator[tuple[psutil.Process, int]]:
    """Every port that other machines can reach, with its process."""
    for process in live.processes():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip):
                    yield process, connection.laddr.port


def test_only_what_the_documentation_names_listens_beyond_this_machine(first: Live) -> None:
    """docs/edge.md: gRPC of the ingress replica and the fallback proxy, and each replica's port for other tiers."""
    (told, *_) = [
        environment
        for environment in (process.environ() for process in first.processes())
        if "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT" in environment
    ]
    least, most = (int(told[f"RAY_SERVE_DIRECT_INGRESS_{bound}_GRPC_PORT"]) for bound in ("MIN", "MAX"))
    grpc_ports = {int(told["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"]), *range(least, most + 1)}
    others = [(" ".join(process.cmdline()), port) for process, port in open_ports(first) if port not in grpc_ports]
    assert [line for line, _ in others if not line.startswith("ray::ServeReplica")] == []
    assert len({line for line, _ in others}) == len(others) == 3  # ingress, tokenizer, model: one port each


def test_a_page_of_another_name_is_refused_and_health_checks_are_not(first: Live) -> None:
    rebound = {"host": "evil.example"}
    assert httpx.post(f"{first.base_url}/embed", json={"inputs": "hello"}, headers=rebound).status_code == 403
    for path in ("/-/healthz", "/health", "/ready"):
        assert httpx.get(f"{first.base_url}{path}", headers=rebound, timeout=60).status_code == 200, path


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as it is written, with the virtual environment's programs on the path."""
    own = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=own, cwd=ROOT, check=False)


def printed_command(live: Live) -> str:
    return re.search(r"^How it fares: (.+)$", live.log, re.MULTILINE)[1]  # type: ignore[index]


def dashboard(live: Live) -> str:
    arguments = shlex.split(printed_command(live))
    return arguments[arguments.index("--address") + 1] if "--address" in arguments else "http://127.0.0.1:8265"


def test_the_command_that_is_printed_at_the_start_tells_the_status(first: Live, proxy: Proxy) -> None:
    done = shell(printed_command(first), **through_proxy(proxy.url))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"HTTP on {first.base_url.removeprefix('http://')}",
        "serve_app: RUNNING",
        "  ingress: HEALTHY, 1 of 1 replicas run",
        "first: RUNNING",
        "  first-tokenizer: HEALTHY, 1 of 1 replicas run",
        "  first-model: HEALTHY, 1 of 1 replicas run",
    ]


DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "serve_config.yaml", ROOT / "cluster.yaml"]
ASKS_A_CLUSTER = re.compile(r"(?:RAY_AUTH_MODE=token )?\b(?:serve|serve-app) (?:status|deploy serve_config\.yaml)")


def documented() -> list[str]:
    """Every command of a document that asks a cluster's dashboard, with the variable that is written before it."""
    return sorted({command for file in DOCUMENTS for command in ASKS_A_CLUSTER.findall(file.read_text("utf-8"))})


def test_commands_are_documented() -> None:
    assert documented()


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_works_as_it_is_printed(command: str, first: Live) -> None:
    """Of the server's own file; RAY_DASHBOARD_ADDRESS stands for the usual address, which another server may have."""
    command = command.replace("serve_config.yaml", str(first.folder / "serve_config.yaml"))
    done = shell(command, RAY_DASHBOARD_ADDRESS=dashboard(first))
    assert done.returncode == 0, done.stdout + done.stderr
    if "status" in command:
        assert "RUNNING" in done.stdout
    wait_until_ready(first)


def test_prewarm_finds_the_cluster_of_the_server(first: Live) -> None:
    address = re.search(r"--gcs-address=(\S+)", " ".join(raylet(first).cmdline()))
    assert address is not None
    done = shell(
        f"serve-app prewarm {first.folder}/serve_config.yaml --address {address[1]}", RAY_TMPDIR=str(first.folder)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready" in done.stdout


def raylet(live: Live) -> psutil.Process:
    return next(process for process in live.processes() if process.name() == "raylet")


class Watch:
    """Whoever answers at an address: the names of the models that they serve, while the `with` block runs."""

    def __init__(self, base_url: str) -> None:
        self.models: set[str] = set()
        self._url, self._ended = base_url, threading.Event()
        self._threads = [
            threading.Thread(daemon=True, target=self._look, args=(path,)) for path in ("/info", "/v1/models", "/ready")
        ]

    def _look(self, path: str) -> None:
        while not self._ended.wait(0.05):
            try:
                answer = httpx.get(f"{self._url}{path}", timeout=5)
            except httpx.HTTPError:
                continue
            if answer.is_success:
                self.models |= set(re.findall(r"\b(?:first|second)\b", answer.text)) or {path}

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def test_a_second_server_never_answers_for_the_first_nor_the_first_for_it(first: Live) -> None:
    """Not even while it starts and stops, when it has no ingress replica and Serve's fallback proxy answers."""
    with own_folder() as folder:
        config = named("second", str(folder / "models"))
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        with Watch(url) as at_second, Watch(first.base_url) as at_first:
            with started(folder, config, {}, SERVE_APP_SERVE) as second:
                wait_until_ready(second, START_TIMEOUT_S)
                assert len(embed(second.base_url)[0]) == 384
                assert len(embed(first.base_url)[0]) == 32
                (own, other) = (haproxy_folder(live) for live in (first, second))
                assert own != other
                assert own.stat().st_mode & 0o077 == 0
                assert shell(printed_command(second)).stdout.count("second") == 3
                assert dashboard(second) != dashboard(first)
            assert len(embed(first.base_url)[0]) == 32
    assert at_second.models <= {"second", "/ready"}
    assert "second" in at_second.models
    assert at_first.models <= {"first", "/ready"}


def haproxy_folder(live: Live) -> Path:
    (haproxy,) = (process for process in live.processes() if process.name() == "haproxy")
    return Path(haproxy.cmdline()[haproxy.cmdline().index("-f") + 1]).parent.parent


def as_nobody() -> tuple[str, ...]:
    """How to run this Python as a user id without an account; the test is skipped where that cannot be done."""
    user = as_other_user()
    for reading in ((), ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")):
        command = (*user, *reading)
        done = subprocess.run(
            [*command, "env", str(PROGRAMS / "pip"), "--version"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return command
    told = done.stderr.strip()
    pytest.skip(
        f"a server of another user id needs a Python that user {OTHER_USER} can run, and {PROGRAMS} fails: {told}"
    )


def test_a_user_without_account_and_home_can_serve() -> None:
    """As OpenShift runs containers."""
    command = (*as_nobody(), "env", "-u", "HOME", *SERVE_APP_SERVE)
    with own_folder() as folder:
        config = named("nobodys", "~/models")
        os.chown(folder, OTHER_USER, OTHER_USER)
        with started(folder, config, {}, command) as live:
            wait_until_ready(live, START_TIMEOUT_S)
            assert len(embed(live.base_url)[0]) == 384
            home = folder / f"serve-app-home-{OTHER_USER}"
            assert (home / "models" / "nobodys").is_dir()
            status = shell(shlex.join(command[:-2]) + f" {printed_command(live)}", RAY_TMPDIR=str(folder))
            assert status.returncode == 0, status.stderr
            assert "serve_app: RUNNING" in status.stdout
            assert not list(folder.glob("~*"))
    assert not (ROOT / "~").exists()

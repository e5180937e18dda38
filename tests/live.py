"""A real server for tests: `serve run` in a process of its own, on its own ports and folders."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from deploy.examples.make_tiny_models import make
from serve_app.cli import haproxy
from serve_app.config import MODEL_BUILDER

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "deploy" / "examples" / "all-tasks.yaml"
START_TIMEOUT_S = 150
STOP_TIMEOUT_S = 60
EXAMPLES_START_TIMEOUT_S = 600
"""25 replicas, most of which import torch, on as few as two cores."""

PROGRAMS = Path(sys.executable).parent
SERVE_RUN = (str(PROGRAMS / "serve"), "run")
SERVE_APP_SERVE = (str(PROGRAMS / "serve-app"), "serve")

_ingress_ports = itertools.count(20_000 + os.getpid() % 100 * 40, 40)
"""Serve listens with SO_REUSEPORT: two servers on the same ports would answer each other's requests. Its fallback
proxies, which answer while no ingress replica is ready, have a fixed port of their own by default."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Live:
    """A running server; `log` is all that `serve run` printed, `folder` holds everything it wrote."""

    base_url: str
    process: subprocess.Popen[bytes]
    folder: Path
    grpc_address: str = ""

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def dashboard(self) -> str:
        """Address of Ray's dashboard, as `serve run` prints it."""
        from serve_app.cli.serve import DASHBOARD  # here, because tests/gpu runs where there is no Ray

        found = DASHBOARD.search(self.log)
        assert found is not None, self.log
        return found.group(1)

    def wait_until(self, status: str, application: str | None = None, timeout_s: float = 180.0) -> None:
        """Until that application, or every one, has the status."""
        from serve_app.cli.dashboard import Dashboard

        deadline = time.monotonic() + timeout_s
        while True:
            applications = Dashboard(self.dashboard).details()["applications"]
            watched = applications.values() if application is None else [applications[application]]
            if {one["status"] for one in watched} == {status}:
                return
            assert time.monotonic() < deadline, applications
            time.sleep(0.5)

    def serve_app(self, *command: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a command of `serve-app` from the user's side, against this server's dashboard."""
        return subprocess.run(
            [sys.executable, "-m", "serve_app.cli.main", *command, "--address", self.dashboard],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=timeout_s,
            check=False,
        )

    def processes(self) -> list[psutil.Process]:
        """Every process of this server: all that carry its Ray folder in their environment or were its children."""
        mine = str(self.folder)
        return [p for p in psutil.process_iter() if _belongs(p, mine)]

    def interrupt(self) -> None:
        """Ctrl-C, and wait until `serve run` has ended."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(STOP_TIMEOUT_S)


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get("SERVE_APP_TEST_FOLDER") == folder
    except (psutil.Error, OSError):
        return False


def local_config(folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> dict[str, Any]:
    """serve_config.yaml as it is in the repository, but for ports and folders; `change` may edit it."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config = copy.deepcopy(config)
    config["http_options"]["port"] = free_port()
    config["grpc_options"]["port"] = free_port()
    first_port = next(_ingress_ports)
    config["controller_options"]["runtime_env"]["env_vars"] |= {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "haproxy" / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "haproxy"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "haproxy" / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + 19),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_port + 20),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_port + 39),
    }
    for application in config["applications"]:
        application["args"]["cache"] = {"root": str(folder / "models")}
    change(config)
    return config


def models_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a Serve configuration, to be read or edited."""
    return [application["args"]["model"] for application in config["applications"] if "model" in application["args"]]


def application_of(config: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """An application for one more model, with one small replica of each tier."""
    one_replica = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    return {
        "name": model["name"],
        "route_prefix": None,
        "import_path": MODEL_BUILDER,
        "args": {"cache": config["applications"][0]["args"]["cache"], "model": model},
        "deployments": [{"name": f"{model['name']}-{tier}", **one_replica} for tier in ("tokenizer", "model")],
    }


@contextmanager
def served(
    change: Callable[[dict[str, Any]], None] = lambda config: None,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[Live]:
    """`serve run` of `local_config(change)`, ready to answer; everything is gone afterwards, or the test fails."""
    with own_folder() as folder, started(folder, local_config(folder, change), environment or {}) as live:
        if wait:
            wait_until_ready(live)
        yield live


@contextmanager
def own_folder() -> Iterator[Path]:
    """For all that a server writes. Its path is short, because Ray puts Unix sockets into it."""
    folder = Path(tempfile.mkdtemp(prefix="sa-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started(
    folder: Path, config: dict[str, Any], environment: Mapping[str, str], command: Sequence[str] = SERVE_RUN
) -> Iterator[Live]:
    """The command, given a file with `config`. When the block ends every process of it is gone."""
    (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
    base_url, grpc_address = (f"127.0.0.1:{config[name]['port']}" for name in ("http_options", "grpc_options"))
    live = Live(f"http://{base_url}", _start(folder, environment, command), folder, grpc_address)
    try:
        yield live
    finally:
        _stop(live)


def _start(folder: Path, environment: Mapping[str, str], command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, str(folder / "serve_config.yaml")],
        stdin=subprocess.DEVNULL,
        stdout=(folder / "log").open("wb"),
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        start_new_session=True,
        env={
            **os.environ,
            "RAY_TMPDIR": str(folder),
            "SERVE_APP_TEST_FOLDER": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            haproxy.VARIABLE: str(haproxy.command_path()),
            **environment,
        },
        # A shell that starts tests in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


@contextmanager
def examples_served(models: Path, settings: Mapping[str, Any] | None = None) -> Iterator[Live]:
    """deploy/examples/all-tasks.yaml with its models, made in `models`; `settings` are the ingress's own."""
    make(models)

    def serve_examples(config: dict[str, Any]) -> None:
        cache = config["applications"][0]["args"]["cache"]
        config["applications"] = applications = yaml.safe_load(EXAMPLES.read_text())["applications"]
        applications[0]["deployments"][0]["user_config"] |= settings or {}
        for application in applications:
            application["args"]["cache"] = cache
        for model in models_of(config):
            model["source"] = model["source"].replace("~/.cache/serve_app/examples", str(models))

    with served(serve_examples, wait=False) as live:
        wait_until_ready(live, EXAMPLES_START_TIMEOUT_S)
        yield live


def wait_until_ready(live: Live, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    last = "nothing answered"
    while time.monotonic() < deadline:
        if live.process.poll() is not None:
            raise AssertionError(f"serve run ended with {live.process.returncode}:\n{live.log[-4000:]}")
        if "build_serve_application failed" in live.log:
            raise AssertionError(f"the application could not be built:\n{live.log[-4000:]}")
        try:
            answer = httpx.get(f"{live.base_url}/ready", timeout=10)
            if answer.status_code == httpx.codes.OK:
                return
            last = answer.text
        except httpx.HTTPError as error:
            last = repr(error)
        time.sleep(0.3)
    raise AssertionError(f"not ready after {timeout_s} s: {last}\n{live.log[-4000:]}")


def _stop(live: Live) -> None:
    if live.process.poll() is None:
        try:
            live.interrupt()
        except subprocess.TimeoutExpired:
            live.process.kill()
    left = live.processes()
    psutil.wait_procs(left, timeout=10)
    for process in [p for p in left if p.is_running()]:
        process.kill()

"""What `serve run` is told beside the file: by `serve-app serve`, where neither the file nor the user says it."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import haproxy
from serve_app.cli.environment import server_environment
from serve_app.cli.serve_file import Finding, ServeFile, parse_file
from tests.live import ROOT, free_port

MAXCONN = "RAY_SERVE_HAPROXY_MAXCONN"
SOCKET = "RAY_SERVE_HAPROXY_SOCKET_PATH"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv(haproxy.VARIABLE, raising=False)


@pytest.fixture
def variables() -> dict[str, str]:
    """What the file says to the controller."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1"}


@pytest.fixture
def file(tmp_path: Path, variables: dict[str, str]) -> Callable[[], ServeFile]:
    def written() -> ServeFile:
        config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"], config["grpc_options"]["port"] = free_port(), free_port()
        config["controller_options"]["runtime_env"]["env_vars"] = variables
        (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
        file, findings = parse_file(tmp_path / "serve_config.yaml")
        assert file is not None, findings
        return file

    return written


@pytest.fixture
def descriptors() -> Iterator[Callable[[int], None]]:
    """Set the hard limit of open files, of which Python reads this one only."""
    patch = pytest.MonkeyPatch()
    yield lambda hard: patch.setattr(resource, "getrlimit", lambda _: (min(1024, hard), hard))
    patch.undo()


def told(file: ServeFile) -> tuple[dict[str, str], list[Finding]]:
    with server_environment(file) as (environment, findings):
        return environment, findings


def test_haproxys_files_are_in_a_folder_of_this_server_that_goes_with_it(file: Callable[[], ServeFile]) -> None:
    with server_environment(file()) as (environment, _), server_environment(file()) as (other, _):
        folder = Path(environment[SOCKET]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert Path(environment["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]) == folder
        assert Path(other[SOCKET]).parent != folder
    assert not folder.exists()


def test_what_the_file_or_the_user_sets_stays(
    file: Callable[[], ServeFile], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables[SOCKET] = "/run/mine.sock"
    monkeypatch.setenv(haproxy.VARIABLE, "/usr/sbin/haproxy")
    monkeypatch.setenv("grpc_proxy", "http://proxy:3128")
    environment, _ = told(file())
    assert SOCKET not in environment
    assert environment[haproxy.VARIABLE] == "/usr/sbin/haproxy"
    assert environment["grpc_proxy"] == "http://proxy:3128"


LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@pytest.mark.parametrize(("host", "told_to_ray"), [("127.0.0.1", "0"), ("localhost", "0"), ("0.0.0.0", None)])
def test_rays_own_ports_are_for_this_machine_alone_where_http_is(
    file: Callable[[], ServeFile], monkeypatch: pytest.MonkeyPatch, host: str, told_to_ray: str | None
) -> None:
    monkeypatch.delenv(LOOPBACK, raising=False)
    environment, _ = told(dataclasses.replace(file(), host=host))
    assert environment.get(LOOPBACK) == told_to_ray
    monkeypatch.setenv(LOOPBACK, "1")
    assert told(dataclasses.replace(file(), host=host))[0][LOOPBACK] == "1"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert told(dataclasses.replace(file(), host=host))[0][LOOPBACK] == "1"


def test_ray_takes_loopback_for_its_address_then(file: Callable[[], ServeFile]) -> None:
    """And every process of Ray binds to the address of its node, where that is loopback."""
    asked = "import ray.util; print(ray.util.get_node_ip_address())"
    environment, _ = told(file())
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "127.0.0.1"


def test_haproxy_is_ours_and_calls_between_tiers_need_no_proxy(file: Callable[[], ServeFile]) -> None:
    environment, _ = told(file())
    assert environment[haproxy.VARIABLE] == str(haproxy.command_path())
    assert environment["grpc_proxy"] == ""


def test_exceptions_from_the_proxy_are_kept_and_this_machine_is_one(
    file: Callable[[], ServeFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet.example,127.0.0.1")
    environment, _ = told(file())
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert environment["no_proxy"].split(",")[:3] == ["intranet.example", "127.0.0.1", "localhost"]


def test_a_cluster_that_is_joined_keeps_its_ports_and_files(
    file: Callable[[], ServeFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own Serve may have them, and takes the new configuration."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    environment, findings = told(file())
    assert not [name for name in environment if name.endswith("_PORT") and name.startswith("RAY_SERVE")]
    assert SOCKET not in environment
    assert findings == []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert SOCKET in told(file())[0]


def test_where_few_files_may_be_open_haproxy_takes_fewer_connections(
    file: Callable[[], ServeFile], descriptors: Callable[[int], None]
) -> None:
    descriptors(4096)
    environment, (finding,) = told(file())
    assert environment[MAXCONN] == "1536"
    assert not finding.is_error
    assert "1,536 connections" in finding.reason


def test_connections_that_are_asked_for_and_cannot_be_had_are_told(
    file: Callable[[], ServeFile], variables: dict[str, str], descriptors: Callable[[int], None]
) -> None:
    variables[MAXCONN] = "2000"
    descriptors(4096)
    _, (finding,) = told(file())
    assert finding.is_error
    assert finding.key == f"controller_options.runtime_env.env_vars.{MAXCONN}"
    assert finding.reason.endswith("raise that limit to 5,256, or set this to 1536 at most")


def test_too_few_files_for_any_server_are_told(
    file: Callable[[], ServeFile], descriptors: Callable[[int], None]
) -> None:
    descriptors(256)
    _, (finding,) = told(file())
    assert finding.is_error
    assert finding.reason.endswith("raise that limit to 10,496")


@pytest.mark.parametrize("hard", [resource.RLIM_INFINITY, 524_288])
def test_where_enough_files_may_be_open_nothing_is_changed(
    file: Callable[[], ServeFile], descriptors: Callable[[int], None], hard: int
) -> None:
    descriptors(hard)
    environment, findings = told(file())
    assert MAXCONN not in environment
    assert findings == []

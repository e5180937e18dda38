"""What is told before a start about ports that somebody else has."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import serve
from serve_app.cli.ports import joins_a_cluster, listeners, port_findings
from serve_app.cli.serve_file import ServeFile, parse_file
from tests.live import ROOT, free_port

Read = Callable[[dict[str, Any]], ServeFile]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


@pytest.fixture
def config() -> dict[str, Any]:
    """The project's own file, with ports that are free."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["grpc_options"]["port"] = free_port()
    config["controller_options"]["runtime_env"]["env_vars"] |= {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }
    return config


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "serve_config.yaml"


@pytest.fixture
def read(written: Path) -> Read:
    """A config as it is read from its file."""

    def read(config: dict[str, Any]) -> ServeFile:
        written.write_text(yaml.safe_dump(config))
        file, findings = parse_file(written)
        assert file is not None, findings
        return file

    return read


def test_free_ports_are_no_finding(config: dict[str, Any], read: Read) -> None:
    assert len(list(listeners(read(config)))) == 4
    assert port_findings(read(config)) == []


@pytest.mark.parametrize("options", ["http_options", "grpc_options"])
def test_a_port_in_use_is_named_with_its_key(config: dict[str, Any], read: Read, options: str, taken: int) -> None:
    config[options]["port"] = taken
    (finding,) = port_findings(read(config))
    assert finding.key == f"{options}.port"
    assert finding.is_error
    assert f":{taken} is in use" in finding.reason


def test_ports_of_haproxy_are_tried_too(config: dict[str, Any], read: Read, taken: int) -> None:
    config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(taken)
    (finding,) = port_findings(read(config))
    assert finding.key == "controller_options.runtime_env.env_vars.RAY_SERVE_HAPROXY_METRICS_PORT"


def test_haproxy_has_none_where_it_is_not_used(
    config: dict[str, Any], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    del config["controller_options"]
    assert [listener.key for listener in listeners(read(config))] == ["http_options.port", "grpc_options.port"]


def test_defaults_are_those_of_serve(read: Read) -> None:
    (only,) = listeners(read({"applications": []}))
    assert (only.host, only.port) == ("0.0.0.0", 8000)


def test_an_address_of_another_machine_is_told(config: dict[str, Any], read: Read) -> None:
    config["http_options"]["host"] = "192.0.2.1"
    (finding,) = port_findings(read(config))
    assert finding.reason.startswith("cannot listen on 192.0.2.1:")


def test_nothing_is_said_where_a_cluster_is_joined(
    config: dict[str, Any], read: Read, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own Serve may have the port, and takes the new configuration."""
    config["http_options"]["port"] = taken
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert port_findings(read(config)) == []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert len(port_findings(read(config))) == 1


def test_a_cluster_that_ray_start_made_is_joined(tmp_path: Path) -> None:
    assert not joins_a_cluster()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    assert joins_a_cluster()


def test_serve_starts_nothing_without_its_port(
    config: dict[str, Any], read: Read, taken: int, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["http_options"]["port"] = taken
    read(config)
    assert serve.run(argparse.Namespace(config=written)) == 1
    assert f"http_options.port: 127.0.0.1:{taken} is in use" in capsys.readouterr().err

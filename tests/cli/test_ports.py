"""What is told before a start about ports that somebody else has, and which ports a server gets of its own."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import serve
from serve_app.cli.ports import SERVERS, Place, joins_a_cluster, listeners, port_findings
from serve_app.cli.serve_file import ServeFile, parse_file
from serve_app.errors import ConfigError
from tests.live import ROOT, free_port

Read = Callable[[dict[str, Any]], ServeFile]
OWN = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


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
    config["controller_options"]["runtime_env"]["env_vars"] |= {name: str(free_port()) for name in OWN}
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


def found(file: ServeFile) -> list[Any]:
    return port_findings(file, file.controller_variables)


def test_free_ports_are_no_finding(config: dict[str, Any], read: Read) -> None:
    file = read(config)
    assert len(list(listeners(file, file.controller_variables))) == 6
    assert found(file) == []


@pytest.mark.parametrize("options", ["http_options", "grpc_options"])
def test_a_port_in_use_is_named_with_its_key(config: dict[str, Any], read: Read, options: str, taken: int) -> None:
    config[options]["port"] = taken
    (finding,) = found(read(config))
    assert finding.key == f"{options}.port"
    assert finding.is_error
    assert f":{taken} is in use" in finding.reason


@pytest.mark.parametrize("name", OWN)
def test_ports_that_serve_takes_beside_these_are_tried_too(
    config: dict[str, Any], read: Read, taken: int, name: str
) -> None:
    config["controller_options"]["runtime_env"]["env_vars"][name] = str(taken)
    (finding,) = found(read(config))
    assert finding.key == f"controller_options.runtime_env.env_vars.{name}"


def test_a_port_that_another_server_would_share_is_in_use(config: dict[str, Any], read: Read) -> None:
    """As Serve's proxies do: with SO_REUSEPORT the system lets any number of them listen, and gives each a part."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as sharing:
        port = sharing.getsockname()[1]
        config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(port)
        (finding,) = found(read(config))
    assert f"127.0.0.1:{port} is in use" in finding.reason


def test_one_port_for_two_purposes_is_a_finding(config: dict[str, Any], read: Read) -> None:
    config["grpc_options"]["port"] = config["http_options"]["port"]
    (finding,) = found(read(config))
    assert (finding.key, finding.reason) == (
        "grpc_options.port",
        f"{config['http_options']['port']} is http_options.port too; choose another port",
    )


def test_haproxy_has_none_where_it_is_not_used(config: dict[str, Any], read: Read) -> None:
    del config["controller_options"]
    assert [listener.key for listener in listeners(read(config), {})] == ["http_options.port", "grpc_options.port"]


def test_defaults_are_those_of_serve(read: Read) -> None:
    (only,) = listeners(read({"applications": []}), {})
    assert (only.host, only.port) == ("0.0.0.0", 8000)


def test_an_address_of_another_machine_is_told(config: dict[str, Any], read: Read) -> None:
    config["http_options"]["host"] = "192.0.2.1"
    assert found(read(config))[0].reason.startswith("cannot listen on 192.0.2.1:")


def take() -> Place:
    """A place among others than those of real servers, which other tests start meanwhile."""
    return Place(first=26_000)


@pytest.fixture
def places() -> Iterator[list[Place]]:
    """To be filled by a test, and left for it."""
    places: list[Place] = []
    yield places
    for place in places:
        place.leave()


def test_no_two_servers_have_a_port_in_common(places: list[Place]) -> None:
    places += [take(), take(), take()]
    taken: set[int] = set()
    for place in places:
        ports = {name.removeprefix("RAY_SERVE_"): int(port) for name, port in place.ports({}).items()}
        own = {port for name, port in ports.items() if "DIRECT_INGRESS" not in name}
        for protocol in ("HTTP", "GRPC"):
            least, most = (ports[f"DIRECT_INGRESS_{bound}_{protocol}_PORT"] for bound in ("MIN", "MAX"))
            own |= set(range(least, most))
        assert len(own) == 4 + 2 * 99
        assert not own & taken
        taken |= own


def test_a_place_that_was_left_is_taken_again(places: list[Place]) -> None:
    first = take()
    first.leave()
    places.append(take())
    assert places[0].number == first.number


def test_ports_that_are_set_stay_as_they_are(places: list[Place]) -> None:
    """A range that has one bound set is left to whoever set it."""
    places.append(take())
    settings = {OWN[0]: "1234", "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "20000"}
    chosen = places[0].ports(settings)
    assert not chosen.keys() & {*settings, "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"}
    assert chosen.keys() >= {*OWN[1:], "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"}


def test_there_are_no_more_servers_than_places(places: list[Place]) -> None:
    with pytest.raises(ConfigError, match=f"{SERVERS} servers are on this machine already"):
        places.extend(take() for _ in range(SERVERS + 1))


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

"""The ports that a server is about to take: chosen where nobody has chosen them, and tried before anything starts.

Serve starts its cluster and loads the models first, and then says in HAProxy's words that it cannot bind; meanwhile
whoever has the port answers in our place. Serve's fallback proxies, which answer while no ingress replica is ready,
even share theirs with those of another server (SO_REUSEPORT), so that each answers for the other.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from serve_app.cli.serve_file import Finding, ServeFile
from serve_app.errors import ConfigError
from serve_app.ingress.reach import is_loopback

_EVERYWHERE = "0.0.0.0"
CONTROLLER = "controller_options.runtime_env.env_vars"
_METRICS, _STATS = "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"
_FALLBACK_HTTP, _FALLBACK_GRPC = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"
_DEFAULTS = {_METRICS: 9101, _STATS: 8404, _FALLBACK_HTTP: 8500, _FALLBACK_GRPC: 9500}
"""Ports that Serve takes beside those of clients, with Ray's defaults."""

_REPLICAS = {"HTTP": 30_000, "GRPC": 40_000}
"""First of the ports of ingress replicas, by protocol, as Ray has them."""

SERVERS = 10
"""Servers of `serve-app serve` that can be on one machine at once."""

_REPLICA_PORTS = 100
"""For the ingress replicas of each. Ray's default is 1,000, for the only server of a machine."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where the server will listen, and the key of the file that says so."""

    key: str
    host: str
    port: int


class Place:
    """The number of a server among those on this machine, from 0. No other server gets it until `leave`, or the end of
    the process.

    Raises ConfigError if there are none left. It is held by listening on the first port of the ingress replicas, where
    those of a plain `serve run` listen too; `first` is that of number 0.
    """

    def __init__(self, first: int = _REPLICAS["HTTP"]) -> None:
        for number in range(SERVERS):
            try:
                self._held = socket.create_server(("127.0.0.1", first + number * _REPLICA_PORTS))
            except OSError:
                continue
            self.number = number
            return
        raise ConfigError(f"{SERVERS} servers are on this machine already: stop one of them")

    def leave(self) -> None:
        self._held.close()

    def ports(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Variables that give Serve ports of this server's own; what `settings` name stays as it is."""
        chosen: dict[str, int] = {}
        for name, default in _DEFAULTS.items():
            if name not in settings:
                chosen[name] = default + self.number
        for protocol, first in _REPLICAS.items():
            least, most = (f"RAY_SERVE_DIRECT_INGRESS_{bound}_{protocol}_PORT" for bound in ("MIN", "MAX"))
            if least not in settings and most not in settings:
                start = first + self.number * _REPLICA_PORTS
                chosen |= {least: start + 1, most: start + _REPLICA_PORTS}
        return {name: str(port) for name, port in chosen.items()}


def port_findings(file: ServeFile, settings: Mapping[str, str]) -> list[Finding]:
    """The ports of a server that cannot be had on this machine. `settings` are the variables of its controller."""
    findings: list[Finding] = []
    seen: dict[int, str] = {}
    for listener in listeners(file, settings):
        reason = _obstacle(listener)
        if listener.port in seen:
            reason = f"{listener.port} is {seen[listener.port]} too; choose another port"
        seen[listener.port] = listener.key
        if reason is not None:
            findings.append(Finding(listener.key, reason))
    return findings


def joins_a_cluster() -> bool:
    """Whether `serve run` finds a cluster to go to (RAY_ADDRESS, or `ray start` on this machine) and starts none."""
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS")
    return address != "local" and bool(address or read_ray_address())


def listeners(file: ServeFile, settings: Mapping[str, str]) -> Iterator[Listener]:
    yield Listener("http_options.port", file.host, file.http_port)
    if file.grpc_port is not None:
        yield Listener("grpc_options.port", _EVERYWHERE, file.grpc_port)
    if settings.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return
    beside = file.host if is_loopback(file.host) else _EVERYWHERE
    hosts = {_FALLBACK_HTTP: file.host, _METRICS: beside, _STATS: beside, _FALLBACK_GRPC: _EVERYWHERE}
    for name, default in _DEFAULTS.items():
        if name != _FALLBACK_GRPC or file.grpc_port is not None:
            yield Listener(f"{CONTROLLER}.{name}", hosts[name], int(settings.get(name, default)))


def _obstacle(listener: Listener) -> str | None:
    """Why nobody can listen there, or None. Without SO_REUSEPORT, which would let the port be shared."""
    where = f"{listener.host}:{listener.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{where} is in use, perhaps by another server; stop that one, or choose another port"
        return f"cannot listen on {where}: {error.strerror or error}"
    return None

"""The ports that a server is about to take, tried before anything starts.

Serve starts its cluster and loads the models first, and then says in HAProxy's words that it cannot bind; meanwhile
whoever has the port answers in our place.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.cli.serve_file import Finding

_EVERYWHERE = "0.0.0.0"
_HAPROXY = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
"""Ports of HAProxy's own, with Ray's defaults."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where the server will listen, and the key of the file that says so."""

    key: str
    host: str
    port: int


def port_findings(config: Mapping[str, Any]) -> list[Finding]:
    """The ports of a Serve config (as parsed from its file) that cannot be had on this machine.

    None where `serve run` would go to a cluster that is up already: its Serve may be what has them.
    """
    if joins_a_cluster():
        return []
    found = ((listener, _obstacle(listener)) for listener in listeners(config))
    return [Finding(listener.key, reason) for listener, reason in found if reason is not None]


def joins_a_cluster() -> bool:
    """Whether `serve run` finds a cluster to go to (RAY_ADDRESS, or `ray start` on this machine) and starts none."""
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS")
    return address != "local" and bool(address or read_ray_address())


def listeners(config: Mapping[str, Any]) -> Iterator[Listener]:
    http, grpc = config.get("http_options") or {}, config.get("grpc_options") or {}
    yield Listener("http_options.port", str(http.get("host", _EVERYWHERE)), int(http.get("port", 8000)))
    if grpc.get("grpc_servicer_functions"):
        yield Listener("grpc_options.port", _EVERYWHERE, int(grpc.get("port", 9000)))
    where = "controller_options.runtime_env.env_vars"
    variables = ((config.get("controller_options") or {}).get("runtime_env") or {}).get("env_vars") or {}
    settings = {**os.environ, **variables}
    if settings.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        for name, port in _HAPROXY.items():
            yield Listener(f"{where}.{name}", _EVERYWHERE, int(settings.get(name, port)))


def _obstacle(listener: Listener) -> str | None:
    """Why nobody can listen there, or None."""
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

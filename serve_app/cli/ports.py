"""The ports that a server is about to take, tried before anything starts.

Serve starts its cluster and loads the models first, and then says in HAProxy's words that it cannot bind; meanwhile
whoever has the port answers in our place.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.cli.serve_file import Finding, ServeFile

_EVERYWHERE = "0.0.0.0"
_HAPROXY = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
"""Ports of HAProxy's own, with Ray's defaults."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where the server will listen, and the key of the file that says so."""

    key: str
    host: str
    port: int


def port_findings(file: ServeFile) -> list[Finding]:
    """The ports of a Serve config file that cannot be had on this machine.

    None where `serve run` would go to a cluster that is up already: its Serve may be what has them.
    """
    if joins_a_cluster():
        return []
    found = ((listener, _obstacle(listener)) for listener in listeners(file))
    return [Finding(listener.key, reason) for listener, reason in found if reason is not None]


def joins_a_cluster() -> bool:
    """Whether `serve run` finds a cluster to go to (RAY_ADDRESS, or `ray start` on this machine) and starts none."""
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS")
    return address != "local" and bool(address or read_ray_address())


def listeners(file: ServeFile) -> Iterator[Listener]:
    yield Listener("http_options.port", file.host, file.http_port)
    if file.grpc_port is not None:
        yield Listener("grpc_options.port", _EVERYWHERE, file.grpc_port)
    settings = {**os.environ, **file.controller_variables}
    if settings.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        for name, port in _HAPROXY.items():
            key = f"controller_options.runtime_env.env_vars.{name}"
            yield Listener(key, _EVERYWHERE, int(settings.get(name, port)))


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

"""The environment of a server that `serve-app serve` starts on this machine: what Ray and HAProxy need to be told.

The variables of `controller_options` in the file, and those that this process has been given, go before these.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from serve_app.cli import haproxy
from serve_app.cli.home import check_token_can_be_kept
from serve_app.cli.ports import CONTROLLER, Place, joins_a_cluster, port_findings
from serve_app.cli.serve_file import Finding, ServeFile
from serve_app.ingress.reach import is_loopback

_MAXCONN = "RAY_SERVE_HAPROXY_MAXCONN"
_MAXCONN_KEY = f"{CONTROLLER}.{_MAXCONN}"
_MAXCONN_DEFAULT = 4096
_LEAST_CONNECTIONS = 100
_DESCRIPTORS_PER_CONNECTION = 2.5
"""Of HAProxy: two sockets, and half a pipe."""
_SPARE_DESCRIPTORS = 256
"""Of HAProxy for all else: what it listens on, and a health check of each ingress replica."""

_NEVER_PROXIED = ("localhost", "127.0.0.1", "::1", "169.254.169.254", "metadata.google.internal")
"""This machine, and where a cloud tells of it, for which Ray's dashboard asks once."""

_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is 0, Ray takes 127.0.0.1 for the address of a node that it starts, and its processes listen nowhere else.
That is Ray's default on the systems of the name, and works on Linux too."""

_USUAL_FOLDER, _FOLDER = "/tmp", "sa-"
_LONGEST_FOLDER = 97 - len(f"/{_FOLDER}12345678/{'n' * 56}/metrics.sock")
"""97 is HAProxy's bound for a socket's path; Serve puts the id of the node into it, which has 56 letters."""

_HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
"""By Ray's default these lie in one folder for all, and the socket lets everybody on the machine steer HAProxy."""


@contextmanager
def server_environment(file: ServeFile) -> Iterator[tuple[dict[str, str], list[Finding]]]:
    """The environment for `serve run`, and what keeps it from starting; its ports are kept for it in the `with` block.

    A cluster that is up already has an environment of its own, and its Serve may be what has the ports. Raises
    ConfigError if there is no place for one more server on this machine, or none for the token of its cluster.
    """
    environment = _common()
    if joins_a_cluster():
        yield environment, []
        return
    check_token_can_be_kept()
    place, folder = Place(), tempfile.mkdtemp(prefix=_FOLDER, dir=_folder_for_sockets())
    try:
        environment |= _unless_set(haproxy_files(Path(folder)), file)
        if is_loopback(file.host):
            environment.setdefault(_CLUSTERS, "0")
        environment |= place.ports(_settings(environment, file))
        findings = _descriptors(environment, file)
        yield environment, [*findings, *port_findings(file, _settings(environment, file))]
    finally:
        place.leave()
        shutil.rmtree(folder, ignore_errors=True)


def _common() -> dict[str, str]:
    """This process's own. HAProxy is ours unless another one is named, and calls between tiers need no proxy.

    gRPC sends them through the proxy of `http_proxy`, even to this machine, unless `grpc_proxy` is empty; it does not
    know `no_proxy=*`. What downloads models keeps `http_proxy` and its like. Ray's own requests to this machine are
    exceptions that are told by `no_proxy`.
    """
    environment, path = dict(os.environ), haproxy.command_path()
    if path is not None:
        environment.setdefault(haproxy.VARIABLE, str(path))
    environment.setdefault("grpc_proxy", "")
    exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    never = [host for host in _NEVER_PROXIED if host not in exceptions.split(",")]
    return environment | dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join([*filter(None, [exceptions]), *never]))


def _settings(environment: Mapping[str, str], file: ServeFile) -> dict[str, str]:
    """The variables of Serve's controller."""
    return {**environment, **file.controller_variables}


def _unless_set(variables: Mapping[str, str], file: ServeFile) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in _settings(os.environ, file)}


def _folder_for_sockets() -> str:
    """Ray's folder for what is temporary, unless paths of sockets in it would be too long for HAProxy."""
    folder = os.environ.get("RAY_TMPDIR") or _USUAL_FOLDER
    return folder if len(folder) <= _LONGEST_FOLDER else _USUAL_FOLDER


def haproxy_files(folder: Path) -> dict[str, str]:
    return {variable: str(folder / name) for variable, name in _HAPROXY_FILES.items()}


def _descriptors(environment: dict[str, str], file: ServeFile) -> list[Finding]:
    """Let HAProxy take no more connections than it may have files open; otherwise it would not start."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = _settings(environment, file)
    if most == resource.RLIM_INFINITY or settings.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return []
    allowed = int((most - _SPARE_DESCRIPTORS) / _DESCRIPTORS_PER_CONNECTION)
    wanted = int(settings.get(_MAXCONN, _MAXCONN_DEFAULT))
    if wanted <= allowed:
        return []
    limit = f"no process may have more than {most:,} files open here (ulimit -Hn)"
    if _MAXCONN in settings or allowed < _LEAST_CONNECTIONS:
        advice = f"raise that limit to {int(wanted * _DESCRIPTORS_PER_CONNECTION) + _SPARE_DESCRIPTORS:,}"
        if allowed >= _LEAST_CONNECTIONS:
            advice += f", or set this to {allowed} at most"
        return [Finding(_MAXCONN_KEY, f"{limit}, too few for {wanted:,} connections of clients; {advice}")]
    environment[_MAXCONN] = str(allowed)
    told = f"{limit}, so HAProxy takes {allowed:,} connections of clients at once instead of {wanted:,}"
    return [Finding(_MAXCONN_KEY, told, is_error=False)]

"""Who can reach the server, and whether an API key is asked of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from serve_app.cli.serve_file import Finding, ServeFile
from serve_app.config import IngressConfig
from serve_app.errors import ConfigError
from serve_app.ingress.keys import keys_of_file
from serve_app.ingress.reach import is_loopback

OPEN = (
    "THE SERVER IS OPEN: it listens beyond this machine ({where}) and asks nobody for an API key. Set api_keys under "
    "args (docs/edge.md), or listen on 127.0.0.1; where something in front asks for keys, let nothing else reach it"
)


STILL_OPEN = (
    "listens on every address all the same, because Ray Serve has no setting for it: {grpc}the port of each replica "
    "for the other tiers, which asks for Ray's token. serve-app serve keeps everything else on this machine; see "
    "docs/edge.md for other ways to start Ray"
)
GRPC_OPEN = "gRPC of the ingress replicas and of Serve's fallback proxy, which refuses other machines; "


def still_open(file: ServeFile) -> str | None:
    """What other machines reach of a server whose HTTP is for this machine alone, and what guards it."""
    if not is_loopback(file.host):
        return None
    return STILL_OPEN.format(grpc="" if file.grpc_port is None else GRPC_OPEN)


def exposure_findings(config: IngressConfig, file: ServeFile, where: str) -> Iterator[Finding]:
    """`where` is the key of the application's args."""
    if config.api_keys is None:
        if not is_loopback(file.host):
            yield Finding("http_options.host", OPEN.format(where=_listening(file)), is_error=False)
        return
    if config.api_keys.file is None:
        return
    path = Path(os.path.expandvars(config.api_keys.file)).expanduser()
    at = f"{where}.api_keys.file"
    if not path.is_file():
        yield Finding(at, "it is not on this machine; each node that runs an ingress replica needs it", is_error=False)
        return
    try:
        keys_of_file(path)
    except ConfigError as error:
        yield Finding(at, error.message)


def _listening(file: ServeFile) -> str:
    """HTTP, and gRPC where there is any: Serve binds that one to every address, and has no setting for it."""
    http = f"HTTP on {file.host}"
    if file.grpc_port is None:
        return http
    return f"{http}; gRPC on port {file.grpc_port} and on the ports of its own that each ingress replica has"

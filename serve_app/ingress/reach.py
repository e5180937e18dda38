"""Who can reach the server, and who has.

Serve binds HTTP to `http_options.host`, and its gRPC servers, those of the ingress replicas and of its own proxies, to
every address of the machine; it has no setting for that. So where HTTP is for this machine alone, gRPC calls from
elsewhere are refused when they come.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

import ray
from ray.serve.context import _get_global_client

from serve_app.errors import ForbiddenError


def is_loopback(host: str) -> bool:
    """Whether only this machine is meant by an address, or by the name localhost."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_peer(peer: str) -> None:
    """`peer` is gRPC's word for who calls, as `ipv4:127.0.0.1:52000`. Raises ForbiddenError if it is not of here."""
    kind, _, address = unquote(peer).partition(":")
    if kind != "unix" and not is_loopback(address.rpartition(":")[0].strip("[]")):
        raise ForbiddenError("this server is for its own machine alone: http_options.host is a loopback address")


def serves_this_machine_alone() -> bool:
    """Whether Serve, if it runs, has HTTP on a loopback address. Not for an event loop: it may ask the controller."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return client is not None and is_loopback(client.http_config.host or "")

"""Who can reach the server, and who has.

Serve binds HTTP to `http_options.host`, and its gRPC servers, those of the ingress replicas and of its own proxies, to
every address of the machine; it has no setting for that. So where HTTP is for this machine alone, gRPC calls from
elsewhere are refused when they come.

A page in a browser on this machine reaches a loopback address too. The browser keeps it from reading the answers of
another origin, unless the page's own name leads to 127.0.0.1 meanwhile (DNS rebinding). Such a request has that name in
its `Host`. No browser speaks gRPC without TLS, so gRPC needs no such check.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
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


def check_host(host: bytes, allowed: Collection[str]) -> None:
    """Raises ForbiddenError if `Host`, of a request to a server for this machine alone, is a name for something else.

    `allowed` are further names, in any case. Requests of HTTP/1.0 may have no `Host`, and those of browsers always do.
    """
    if not host:
        return
    named = host.decode("latin-1").lower()
    name = named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]
    if not is_loopback(name.removesuffix(".")) and name not in {each.lower() for each in allowed}:
        raise ForbiddenError(
            "this server is for its own machine alone, and the request's header host has another name: ask localhost "
            "or 127.0.0.1, or list the name in allowed_hosts (user_config of the ingress), or set api_keys"
        )


def serves_this_machine_alone() -> bool:
    """Whether Serve, if it runs, has HTTP on a loopback address. Not for an event loop: it may ask the controller."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return client is not None and is_loopback(client.http_config.host or "")

"""`serve-app status`: how the applications fare, in Serve's own words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.cli.dashboard import RUNNING, Dashboard, add_address_argument, running, tiers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_address_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the status of every application; 0 if there are any and all run, else 1."""
    details = Dashboard(args.address).details()
    applications = details["applications"]
    if not applications:
        print("nothing is deployed")
        return 1
    http = details.get("http_options") or {}
    print(f"HTTP on {http.get('host')}:{http.get('port')}")
    for name, application in applications.items():
        print(*_lines(name, application), sep="\n")
    return 0 if all(application["status"] == RUNNING for application in applications.values()) else 1


def _lines(name: str, application: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name}: {application['status']}"
    yield from _indented(application["message"], 2)
    for deployment, state in tiers(name, application):
        yield f"  {deployment}: {state['status']}, {running(state)} replicas run"
        yield from _indented(state["message"], 4)


def _indented(message: str, columns: int) -> Iterator[str]:
    for line in message.strip().splitlines():
        yield f"{' ' * columns}{line}"

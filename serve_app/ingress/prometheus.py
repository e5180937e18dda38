"""The whole cluster's metrics in one exposition, from each node's Ray metrics endpoint."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import ray

from serve_app.errors import UnavailableError
from serve_app.ingress.single_flight import SingleFlight

SCRAPE_TIMEOUT_S = 5.0

KEPT_S = 1.0
"""Seconds for which an exposition is told again. The replicas themselves report every few seconds."""

OURS = "ray_serve_"
"""What the names of Serve's metrics begin with, this application's (`ray_serve_app_`) among them."""

_THREADS = 8
"""As many nodes are asked at a time."""

Address: TypeAlias = tuple[str, int]


class ClusterMetrics:
    """The expositions of all nodes as one: fetched and merged in threads, for all who ask within a second.

    Belongs to one event loop.
    """

    def __init__(self, addresses: Callable[[], Sequence[Address]] | None = None, kept_s: float = KEPT_S) -> None:
        """`addresses` tells host and port of each node's endpoint; Ray's nodes unless given."""
        self._addresses = addresses or addresses_of_nodes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="metrics")
        self._texts = {prefix: SingleFlight(partial(self._scraped, prefix), kept_s) for prefix in ("", OURS)}

    async def text(self, everything: bool) -> bytes:
        """Prometheus text (format 0.0.4) of all nodes that answer: `OURS`, or all that they tell.

        Raises UnavailableError if none answers.
        """
        return await self._texts["" if everything else OURS]()

    async def _scraped(self, prefix: str) -> bytes:
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(self._threads, self._addresses)
        asked = [loop.run_in_executor(self._threads, fetch, *address) for address in addresses]
        answered = [text for text in await asyncio.gather(*asked) if text is not None]
        if not answered:
            raise UnavailableError("no node's metrics endpoint answers", retry_after_s=SCRAPE_TIMEOUT_S)
        return await loop.run_in_executor(self._threads, _merged, answered, prefix)


def addresses_of_nodes() -> list[Address]:
    """Not for an event loop: it asks Ray's control store."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes if node["Alive"]]


def fetch(host: str, port: int) -> str | None:
    """What an endpoint exposes, None if it does not answer. Not for an event loop."""
    connection = http.client.HTTPConnection(host, port, timeout=SCRAPE_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        return response.read().decode() if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return None
    finally:
        connection.close()


def _merged(expositions: list[str], prefix: str) -> bytes:
    return merge(expositions, prefix).encode()


def merge(expositions: list[str], prefix: str = "") -> str:
    """Several expositions as one: the samples of a metric together, its HELP and TYPE once, each sample once.

    Metrics whose names do not begin with `prefix` are left out.
    """
    kept = (prefix, f"# HELP {prefix}", f"# TYPE {prefix}")
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, dict[str, None]] = {}
    for text in expositions:
        family = ""
        for line in filter(None, text.split("\n")):
            if not line.startswith(kept):
                continue
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, family, _ = [*line.split(" ", 3), ""][:4]
                heads.setdefault(family, {}).setdefault(kind, line)
            elif not line.startswith("#"):
                samples.setdefault(family, {})[line] = None
    lines = [line for family, rows in samples.items() for line in (*heads.get(family, {}).values(), *rows)]
    return "\n".join(lines) + "\n"

"""The whole cluster's metrics in one exposition, from each node's Ray metrics endpoint."""

from __future__ import annotations

import asyncio

import httpx
import ray

from serve_app.errors import UnavailableError

SCRAPE_TIMEOUT_S = 5.0


async def scrape_cluster() -> bytes:
    """Prometheus text (format 0.0.4) of all nodes that answer. Raises UnavailableError if none does."""
    nodes = await asyncio.to_thread(ray.nodes)
    targets = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes if node["Alive"]
    ]
    async with httpx.AsyncClient(timeout=SCRAPE_TIMEOUT_S, trust_env=False) as client:
        texts = await asyncio.gather(*(_scrape(client, target) for target in targets))
    answered = [text for text in texts if text is not None]
    if not answered:
        raise UnavailableError("no node's metrics endpoint answers", retry_after_s=5.0)
    return merge(answered).encode()


async def _scrape(client: httpx.AsyncClient, url: str) -> str | None:
    try:
        response = await client.get(url)
        return response.text if response.status_code == httpx.codes.OK else None
    except httpx.HTTPError:
        return None


def merge(expositions: list[str]) -> str:
    """Several expositions as one: the samples of a metric together, its HELP and TYPE once, each sample once."""
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, dict[str, None]] = {}
    for text in expositions:
        family = ""
        for line in text.split("\n"):
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, family, _ = [*line.split(" ", 3), ""][:4]
                heads.setdefault(family, {}).setdefault(kind, line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, {})[line] = None
    lines = [line for family, rows in samples.items() for line in (*heads.get(family, {}).values(), *rows)]
    return "\n".join(lines) + "\n"

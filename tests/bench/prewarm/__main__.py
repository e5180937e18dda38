"""How long until all nodes have a model, and what the Hub gives for it: one download per cluster, or one per node.

`python -m tests.bench.prewarm` starts real Ray nodes on this machine (each its own folder and address) and the local
hub, whose answers together are limited to a rate, as an uplink is. Prints one Markdown row for each number of nodes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.cache.node import warm_this_node
from serve_app.cache.warmer import alive_nodes, ask_warmer
from serve_app.config import CacheConfig, ModelConfig
from tests.cluster.prewarm_cluster import ROOT, nodes_of_a_cluster
from tests.hub.server import LocalHub, local_hub

CACHE = CacheConfig(root=ROOT, min_free_bytes=0)
SHARDS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    hub_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.prewarm", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--model-mb", type=int, default=400, help="size of the model, in four shards")
    parser.add_argument("--hub-mb-per-s", type=float, default=100.0, help="what all downloads together may take")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is printed")
    args = parser.parse_args()
    print(f"model {args.model_mb} MB, hub {args.hub_mb_per_s:g} MB/s in all, {os.cpu_count()} cores for all nodes")
    print("| nodes | one download, s | one per node, s | hub bytes, one download | hub bytes, one per node |")
    print("|---|---|---|---|---|")
    for count in args.nodes:
        print(row(count, args), flush=True)


def row(count: int, args: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder, local_hub() as hub:
        hub.bytes_per_s = args.hub_mb_per_s * 1e6
        names = [f"n{i}" for i in range(count - 1)]
        with nodes_of_a_cluster(*names, environment={"HF_ENDPOINT": hub.endpoint}):
            model = write_model(hub, Path(folder), args.model_mb * 1_000_000)
            _settle()
            once = _median(lambda: measure(hub, model, through_the_warmer), args.rounds)
            each = _median(lambda: measure(hub, model, each_for_itself), args.rounds)
    size = args.model_mb * 1e6
    return (
        f"| {count} | {once.seconds:.1f} | {each.seconds:.1f} "
        f"| {once.hub_bytes / size:.2f} x the model | {each.hub_bytes / size:.2f} x the model |"
    )


def write_model(hub: LocalHub, folder: Path, size: int) -> ModelConfig:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for shard in range(1, SHARDS + 1):
        (folder / f"model-0000{shard}-of-0000{SHARDS}.safetensors").write_bytes(os.urandom(size // SHARDS))
    return ModelConfig(name="model", source="org/model", revision=hub.add("org/model", folder))


def _settle() -> None:
    """Start a worker on every node, so that the first measurement does not pay for it."""
    ray.get([_on(node, _nothing).remote() for node in alive_nodes()])


def measure(hub: LocalHub, model: ModelConfig, way: Callable[[ModelConfig], Coroutine[Any, Any, None]]) -> Measured:
    """Under a name that no node knows, so that everything has to arrive."""
    fresh = model.model_copy(update={"name": f"m-{uuid.uuid4().hex[:8]}"})
    hub.bytes_sent = 0
    start = time.perf_counter()
    asyncio.run(way(fresh))
    return Measured(time.perf_counter() - start, hub.bytes_sent)


async def through_the_warmer(model: ModelConfig) -> None:
    await ask_warmer("bench", CACHE, "warm", [model])


async def each_for_itself(model: ModelConfig) -> None:
    await asyncio.gather(*(_on(node, _warm_here).remote(model) for node in alive_nodes()))


def _warm_here(model: ModelConfig) -> None:
    warm_this_node(model, CACHE)


def _nothing() -> None:
    """Does nothing, on a node."""


def _on(node: str, function: Callable[..., None]) -> Any:
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=affinity)


def _median(measure_once: Callable[[], Measured], rounds: int) -> Measured:
    measured = [measure_once() for _ in range(rounds)]
    seconds = statistics.median(m.seconds for m in measured)
    return Measured(seconds, round(statistics.median(m.hub_bytes for m in measured)))


if __name__ == "__main__":
    main()

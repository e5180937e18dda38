"""How long until all nodes have a model, and what the Hub gives for it: one download per cluster, or one per node.

`python -m tests.bench.prewarm` starts real Ray nodes on this machine (each its own folder and address) and the local
hub, whose answers together are limited to a rate, as an uplink is. The two ways are measured in turn. Prints one
Markdown row for each number of nodes: medians with the smallest and largest, beside the floor, which is the time that
the hub's line needs for the bytes that the hub must give. TMPDIR chooses where the nodes' disks are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.cache.node import warm_this_node
from serve_app.cache.store import expand
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
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    args = parser.parse_args()
    print(f"model {args.model_mb} MB, hub {args.hub_mb_per_s:g} MB/s in all, {os.cpu_count()} cores for all nodes")
    print("| nodes | one download for all, s | floor, s | hub bytes | one per node, s | floor, s | hub bytes | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for count in args.nodes:
        print(row(count, args), flush=True)


def row(count: int, args: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder, local_hub() as hub:
        names = [f"n{i}" for i in range(count - 1)]
        with nodes_of_a_cluster(*names, environment={"HF_ENDPOINT": hub.endpoint}):
            model = write_model(hub, Path(folder), args.model_mb * 1_000_000)
            _settle()
            hub.bytes_per_s = args.hub_mb_per_s * 1e6
            ways = (through_the_warmer, each_for_itself)
            rounds = [[measure(hub, model, way) for way in ways] for _ in range(args.rounds)]
    once, each = zip(*rounds, strict=True)
    line_s = args.model_mb / args.hub_mb_per_s
    ratio = _median(each) / _median(once)
    return f"| {count} | {_cells(once, line_s, args)} | {_cells(each, count * line_s, args)} | {ratio:.2f} |"


def _cells(measured: Sequence[Measured], floor_s: float, args: argparse.Namespace) -> str:
    seconds = [m.seconds for m in measured]
    given = statistics.median(m.hub_bytes for m in measured) / (args.model_mb * 1e6)
    return f"{_median(measured):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {floor_s:.1f} | {given:.2f} x"


def _median(measured: Sequence[Measured]) -> float:
    return statistics.median(m.seconds for m in measured)


def write_model(hub: LocalHub, folder: Path, size: int) -> ModelConfig:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for shard in range(1, SHARDS + 1):
        (folder / f"model-0000{shard}-of-0000{SHARDS}.safetensors").write_bytes(os.urandom(size // SHARDS))
    return ModelConfig(name="model", source="org/model", revision=hub.add("org/model", folder))


def _settle() -> None:
    """Start a worker on every node, so that the first measurement does not pay for it."""
    ray.get([_on(node, _nothing).remote() for node in alive_nodes()])


def measure(hub: LocalHub, model: ModelConfig, way: Callable[[ModelConfig], Coroutine[Any, Any, None]]) -> Measured:
    """Under a name that no node knows, so that everything has to arrive; it is removed again."""
    fresh = model.model_copy(update={"name": f"m-{uuid.uuid4().hex[:8]}"})
    hub.bytes_sent = 0
    start = time.perf_counter()
    asyncio.run(way(fresh))
    measured = Measured(time.perf_counter() - start, hub.bytes_sent)
    ray.get([_on(node, _remove).remote(fresh.name) for node in alive_nodes()])
    return measured


async def through_the_warmer(model: ModelConfig) -> None:
    await ask_warmer("bench", CACHE, "warm", [model])


async def each_for_itself(model: ModelConfig) -> None:
    await asyncio.gather(*(_on(node, _warm_here).remote(model) for node in alive_nodes()))


def _warm_here(model: ModelConfig) -> None:
    warm_this_node(model, CACHE)


def _remove(name: str) -> None:
    shutil.rmtree(expand(CACHE.root) / name)


def _nothing() -> None:
    """Does nothing, on a node."""


def _on(node: str, function: Callable[..., None]) -> Any:
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=affinity)


if __name__ == "__main__":
    main()

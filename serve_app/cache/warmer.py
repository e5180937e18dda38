"""The one actor of an application that warms nodes, and how to reach it.

Whoever finds no warmer makes one: it holds no state that is not on the nodes' disks, so it may die at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.cache.node import warm_this_node
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import CacheError, SourceUnavailableError

_NAMESPACE = "serve_app"
_RETRY_S = 0.5

_held: dict[str, Any] = {}
"""Handles of the warmers that this process uses. A warmer lives as long as its maker holds it."""


async def open_gate(models: list[dict[str, Any]], cache: dict[str, Any]) -> Any:
    """Wait until every node has `models`; the warmer's handle, to be held while the gate lives. Raises CacheError."""
    app = serve.get_deployment_actor_context().app_name
    parsed = CacheConfig.model_validate(cache)
    await ask_warmer(app, parsed, "warm", [ModelConfig.model_validate(model) for model in models])
    return _held[_warmer_name(app, parsed)]


class Warmer:
    """One per application. Async: it must answer health checks while nodes are being warmed."""

    def __init__(self, cache: CacheConfig) -> None:
        self._cache = cache
        self._under_way: dict[tuple[str, str], asyncio.Task[str]] = {}

    async def warm(self, models: Sequence[ModelConfig]) -> None:
        """Put `models` on every node that is alive. Raises the first CacheError, which names the node."""
        nodes = await asyncio.to_thread(alive_nodes)
        pairs = [(model, node) for model in models for node in nodes]
        results = await asyncio.gather(*(self.ensure(model, node) for model, node in pairs), return_exceptions=True)
        still_alive = await asyncio.to_thread(alive_nodes)
        for (_, node), result in zip(pairs, results, strict=True):
            if isinstance(result, BaseException) and node in still_alive:
                raise result

    async def ensure(self, model: ModelConfig, node_id: str) -> str:
        """The folder of `model` on that node, complete. Calls for the same node and model share one task."""
        key = (model.model_dump_json(), node_id)
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._run_on(node_id, model))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(task)

    async def _run_on(self, node_id: str, model: ModelConfig) -> str:
        task = _warm_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        try:
            return str(await task.remote(model, self._cache))
        except RayTaskError as error:
            if not isinstance(error.cause, CacheError):
                raise
            where = (await asyncio.to_thread(alive_nodes)).get(node_id, node_id)
            raise type(error.cause)(f"node {where}: {error.cause.message}") from None
        except RayError as error:
            raise SourceUnavailableError(f"node {node_id} went away while {model.name} was fetched: {error}") from error


@ray.remote(num_cpus=0, max_retries=3)  # type: ignore[untyped-decorator]
def _warm_node(model: ModelConfig, cache: CacheConfig) -> str:
    return str(warm_this_node(model, cache))


def alive_nodes() -> dict[str, str]:
    """Node id → address, of the nodes that are alive."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


async def ask_warmer(app: str, cache: CacheConfig, method: str, *arguments: Any) -> Any:
    """Call the application's warmer, made now if there is none, again if it dies meanwhile. Raises CacheError."""
    while True:
        warmer = await asyncio.to_thread(_warmer, app, cache)
        try:
            return await getattr(warmer, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, CacheError):
                raise error.cause from None
            raise
        except RayActorError:
            await asyncio.sleep(_RETRY_S)


def _warmer(app: str, cache: CacheConfig) -> Any:
    name = _warmer_name(app, cache)
    options = {"name": name, "namespace": _NAMESPACE, "get_if_exists": True, "num_cpus": 0}
    actor = ray.remote(Warmer).options(**options, max_restarts=-1, max_task_retries=-1, max_concurrency=10_000)
    _held[name] = actor.remote(cache)
    return _held[name]


def _warmer_name(app: str, cache: CacheConfig) -> str:
    """Differs with the cache's configuration, so that a changed one does not meet a warmer that has the old."""
    digest = hashlib.sha256(cache.model_dump_json().encode()).hexdigest()[:12]
    return f"warmer::{app}::{digest}"

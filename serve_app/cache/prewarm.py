"""What deployments need of the cache: no replica is made before its node has the model's files.

Each deployment has a gate (`WarmGate`), which Serve starts before any replica. All gates and replicas of an
application share one `Warmer`, which runs one task per node and model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig
from ray.serve.exceptions import RayServeException

from serve_app.cache.disk import ProcessMark
from serve_app.cache.environment import replica_environment, warn_of_dead_settings
from serve_app.cache.gate import WarmGate
from serve_app.cache.node import warm_this_node
from serve_app.cache.status import ModelOnNode
from serve_app.cache.warmer import ON_HEAD, ask_warmer
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import IncompleteModelError

__all__ = ["cache_status", "ensure_local", "replica_environment", "warmer_actors"]


async def ensure_local(model: ModelConfig, cache: CacheConfig) -> Path:
    """The folder of `model` on this node, complete; to be awaited by a replica before it loads.

    In a Serve replica the application's warmer does it; anywhere else this process does. Raises CacheError.
    """
    warn_of_dead_settings()
    app = _application()
    if app is None:
        return await asyncio.to_thread(warm_this_node, model, cache)
    node_id = ray.get_runtime_context().get_node_id()
    path = Path(await ask_warmer(app, cache, "ensure", model, node_id, ProcessMark.mine()))
    if not await asyncio.to_thread(path.is_dir):
        raise IncompleteModelError(f"{path} is not visible to this replica: mount cache.root at the same place in both")
    return path


def warmer_actors(models: Sequence[ModelConfig], cache: CacheConfig) -> list[DeploymentActorConfig]:
    """For `deployment_actors=` of a deployment: none of its replicas is created before all nodes have `models`."""
    arguments = {
        "models": [model.model_dump(mode="json") for model in models],
        "cache": cache.model_dump(mode="json"),
    }
    options = {"num_cpus": 0, "resources": ON_HEAD}
    return [DeploymentActorConfig(name="warm-gate", actor_class=WarmGate, init_kwargs=arguments, actor_options=options)]


async def cache_status(cache: CacheConfig) -> list[ModelOnNode]:
    """Every model on every node, as this replica's application knows; nothing outside a Serve replica."""
    app = _application()
    if app is None:
        return []
    status: list[ModelOnNode] = await ask_warmer(app, cache, "status")
    return status


def _application() -> str | None:
    """The name of the application that this process is a replica of."""
    if not ray.is_initialized():
        return None
    try:
        return str(serve.get_replica_context().app_name)
    except RayServeException:
        return None

"""What deployments need of the cache: no replica is made before its node has the model's files.

Each deployment has a gate (`WarmGate`), which Serve starts before any replica. All gates and replicas of an
application share one `Warmer`, which runs one task per node and model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig
from ray.serve.exceptions import RayServeException

from serve_app.cache.gate import WarmGate
from serve_app.cache.hub import REPLICA_MARK
from serve_app.cache.node import warm_this_node
from serve_app.cache.warmer import ask_warmer
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import IncompleteModelError


async def ensure_local(model: ModelConfig, cache: CacheConfig) -> Path:
    """The folder of `model` on this node, complete; to be awaited by a replica before it loads.

    In a Serve replica the application's warmer does it; anywhere else this process does. Raises CacheError.
    """
    app = _application()
    if app is None:
        return await asyncio.to_thread(warm_this_node, model, cache)
    node_id = ray.get_runtime_context().get_node_id()
    path = Path(await ask_warmer(app, cache, "ensure", model, node_id))
    if not await asyncio.to_thread(path.is_dir):
        raise IncompleteModelError(f"{path} is not visible to this replica: mount cache.root at the same place in both")
    return path


def warmer_actors(models: Sequence[ModelConfig], cache: CacheConfig) -> list[DeploymentActorConfig]:
    """For `deployment_actors=` of a deployment: none of its replicas is created before all nodes have `models`."""
    arguments = {
        "models": [model.model_dump(mode="json") for model in models],
        "cache": cache.model_dump(mode="json"),
    }
    return [DeploymentActorConfig(name="warm-gate", actor_class=WarmGate, init_kwargs=arguments)]


def replica_environment(cache: CacheConfig) -> dict[str, str]:
    """Environment of a replica: the Hub is off, and nothing of it is looked for outside the cache.

    To be set before huggingface_hub is imported. The Hub's token is not for replicas.
    """
    home = os.path.join(cache.root, ".hf-home")
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": home,
        "HF_HUB_CACHE": os.path.join(home, "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
        REPLICA_MARK: "1",
    }


def _application() -> str | None:
    """The name of the application that this process is a replica of."""
    if not ray.is_initialized():
        return None
    try:
        return str(serve.get_replica_context().app_name)
    except RayServeException:
        return None

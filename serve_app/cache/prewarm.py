"""What deployments need of the cluster's warmer: files before a replica is made, the other tier before it is ready.

Each model deployment has a gate (`WarmGate`), which Serve starts before any replica. All gates and replicas share one
`Warmer`, which runs one task per node and model, and knows which replicas have loaded which version. Every replica that
lives tells it so, which is how it knows what nodes that join should have.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import DeploymentActorConfig
from ray.serve.exceptions import RayServeException

from serve_app.cache.disk import ProcessMark
from serve_app.cache.environment import replica_environment, warn_of_dead_settings
from serve_app.cache.gate import WarmGate
from serve_app.cache.leases import keep_renewing, leases_beside
from serve_app.cache.node import is_direct, warm_this_node
from serve_app.cache.status import ModelOnNode
from serve_app.cache.warmer import APPLICATIONS, ON_HEAD, ask_warmer, restart_warmer
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import IncompleteModelError
from serve_app.timeouts import within
from serve_app.types import TokenBatch, Version
from serve_app.versions import PRESENT_S, Member, TierName, version_of

__all__ = ["Membership", "cache_status", "ensure_local", "replica_environment", "version_here", "warmer_actors"]

PATIENCE_S = (20.0, 60.0)
"""A warmer that does not say a word for so long hangs: its event loop is never busy for more than milliseconds."""


async def ensure_local(model: ModelConfig, cache: CacheConfig) -> Path:
    """The folder of `model` on this node, complete; to be awaited by a replica before it loads.

    In a Serve replica the cluster's warmer does it; anywhere else this process does. Raises CacheError.
    """
    warn_of_dead_settings()
    if _replica_id() is None:
        return await asyncio.to_thread(warm_this_node, model, cache)
    node_id = ray.get_runtime_context().get_node_id()
    mine = ProcessMark.mine()
    path = Path(await ask_warmer(APPLICATIONS, cache, "ensure", model, node_id, mine))
    if not is_direct(model, cache):
        keep_renewing(leases_beside(path), mine)
    if not await asyncio.to_thread(path.is_dir):
        raise IncompleteModelError(f"{path} is not visible to this replica: mount cache.root at the same place in both")
    return path


async def version_here(path: Path, model: ModelConfig, cache: CacheConfig) -> Version:
    """The version of `model` that this replica has in `path`, which `ensure_local` gave."""
    return await asyncio.to_thread(version_of, path, model, is_pinned=not is_direct(model, cache))


class Membership:
    """A replica's place among those of its model. Outside a Serve replica it waits for nobody."""

    def __init__(self, cache: CacheConfig, model: ModelConfig, tier: TierName, version: Version) -> None:
        self._cache = cache
        self._tier, self._model, self._version = tier, model, version
        self._telling: asyncio.Task[None] | None = None

    async def probe(self) -> TokenBatch | None:
        """What a tokenizer replica of this version has encoded, once there is one."""
        if _replica_id() is None:
            return None
        probe: TokenBatch = await self._ask("probe", self._model.name, self._version.fingerprint)
        return probe

    async def enter(self, probe: TokenBatch | None = None) -> None:
        """Wait until this replica, which has loaded, may become ready. A tokenizer replica brings its `probe`."""
        replica = _replica_id()
        if replica is None:
            return
        member = Member(self._model.name, self._tier, self._version.fingerprint, replica)
        self._telling = asyncio.create_task(self._tell(member, probe))
        await self._ask("enter", member, probe)

    async def _tell(self, member: Member, probe: TokenBatch | None) -> None:
        """The replicas' patience differs, so that a warmer that hangs is not started again by all of them."""
        patience_s = random.uniform(*PATIENCE_S)
        while True:
            with suppress(RayError):
                try:
                    await within(self._ask("present", member, probe, self._model), patience_s)
                except asyncio.TimeoutError:
                    restart_warmer(APPLICATIONS, self._cache)
            await asyncio.sleep(PRESENT_S)

    async def _ask(self, method: str, *arguments: object) -> Any:
        return await ask_warmer(APPLICATIONS, self._cache, method, *arguments)


def warmer_actors(models: Sequence[ModelConfig], cache: CacheConfig) -> list[DeploymentActorConfig]:
    """For `deployment_actors=` of a deployment: none of its replicas is created before all nodes have `models`."""
    arguments = {
        "models": [model.model_dump(mode="json") for model in models],
        "cache": cache.model_dump(mode="json"),
    }
    options = {"num_cpus": 0, "resources": ON_HEAD}
    return [DeploymentActorConfig(name="warm-gate", actor_class=WarmGate, init_kwargs=arguments, actor_options=options)]


async def cache_status(cache: CacheConfig) -> list[ModelOnNode]:
    """Every model on every node, as the warmer knows; nothing outside a Serve replica."""
    if _replica_id() is None:
        return []
    status: list[ModelOnNode] = await ask_warmer(APPLICATIONS, cache, "status")
    return status


def _replica_id() -> str | None:
    """The replica of Serve that this process is, if any."""
    if not ray.is_initialized():
        return None
    try:
        return str(serve.get_replica_context().replica_id)
    except RayServeException:
        return None

"""The one actor of a cluster that warms nodes and lets replicas become ready, and how to reach it.

Whoever finds no warmer makes one. It may die at any time: what it knows is on the nodes' disks, or every replica tells
it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.constants import (
    RAY_SERVE_INTERNAL_DEPLOYMENT_APP_NAME_ENV_VAR,
    RAY_SERVE_INTERNAL_DEPLOYMENT_CODE_VERSION_ENV_VAR,
    RAY_SERVE_INTERNAL_DEPLOYMENT_NAME_ENV_VAR,
)

from serve_app.cache.delivery import Delivery
from serve_app.cache.depot import RemoteSite, is_lost
from serve_app.cache.disk import ProcessMark
from serve_app.cache.manifest import Manifest
from serve_app.cache.node import Key, is_direct
from serve_app.cache.status import PHASES, ModelOnNode
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import CacheError, SourceNotFoundError, SourceUnavailableError
from serve_app.metrics import CacheMetrics
from serve_app.timeouts import within
from serve_app.types import TokenBatch
from serve_app.versions import Member, VersionBarrier

logger = logging.getLogger(__name__)

NAMESPACE = "serve_app"
APPLICATIONS = "applications"
"""The warmer that all applications with one cache configuration share."""
ON_HEAD = {"node:__internal_head__": 0.001}
"""Warmers and gates run on the head node: on another they would keep it from being scaled away."""
DEPLOYMENT_VARIABLES = (
    RAY_SERVE_INTERNAL_DEPLOYMENT_APP_NAME_ENV_VAR,
    RAY_SERVE_INTERNAL_DEPLOYMENT_NAME_ENV_VAR,
    RAY_SERVE_INTERNAL_DEPLOYMENT_CODE_VERSION_ENV_VAR,
)
"""By which Serve tells a deployment actor whose it is."""
_RETRY_S = 0.5
_DEPOT_TRIES = 3
_SURVEY_S = 30.0
_TEND_S = 5.0
_WANTED_S = 60.0
"""A model of which no replica has said for so long that it lives is served no more."""
_IDLE_S = 60.0
"""After so long without work the depots are ended; they are made again when they are needed."""

_held: dict[tuple[str, str, str], Any] = {}
"""Handles of the warmers that this process uses, by name and by node and id of this process in the cluster that it is
connected to (the first driver of every cluster has the same id). A command's warmer lives as long as that holds it."""


class Warmer:
    """Brings models to nodes. Async: it must answer health checks and status requests meanwhile."""

    def __init__(self, cache: CacheConfig, outlives_its_maker: bool = False) -> None:
        """One that outlives its maker ends itself when no model has been wanted, and nothing done, for a minute."""
        self._cache = cache
        self._outlives_its_maker = outlives_its_maker
        self._sites: dict[str, RemoteSite] = {}
        self._deliveries: dict[str, asyncio.Task[Delivery]] = {}
        self._under_way: dict[tuple[str, str], asyncio.Task[str]] = {}
        self._status: dict[tuple[str, str], ModelOnNode] = {}
        self._keys: dict[tuple[str, str], Key] = {}
        self._wanted: dict[str, tuple[ModelConfig, float]] = {}
        self._passed: dict[str, str] = {}
        self._metrics = CacheMetrics()
        self._tending: asyncio.Task[None] | None = None
        self._barrier = VersionBarrier()

    async def warm(self, models: Sequence[ModelConfig], keep_going: bool = False) -> None:
        """Put `models` on every node that is alive.

        Raises the first CacheError, which names the node, as soon as it comes; with `keep_going` when all is done.
        """
        nodes = await asyncio.to_thread(alive_nodes)
        in_full = self._cache.verify == "sha256"
        waiting = {asyncio.create_task(self._once(model, node, in_full)): node for model in models for node in nodes}
        errors: list[BaseException] = []
        while waiting and (keep_going or not errors):
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failed = {waiting[task]: error for task in done if (error := task.exception()) is not None}
            alive = await asyncio.to_thread(alive_nodes) if failed else {}
            errors += [error for node, error in failed.items() if node in alive]
            waiting = {task: node for task, node in waiting.items() if task not in done}
        if errors:
            raise errors[0]

    async def ensure(self, model: ModelConfig, node_id: str, process: ProcessMark | None = None) -> str:
        """The folder of `model` on that node, complete, and kept there while `process` lives. Raises CacheError."""
        path = await self._once(model, node_id, False)
        key = self._keys.get((model.name, node_id))
        if process is not None and key is not None:
            await (await self._site(node_id)).lease(key, process)
        return path

    async def pass_gate(self, deployment: str, code_version: str) -> bool:
        """Whether this is the first gate of that version of the deployment to get here, as far as is known."""
        is_first = self._passed.get(deployment) != code_version
        self._passed[deployment] = code_version
        return is_first

    async def present(self, member: Member, probe: TokenBatch | None, model: ModelConfig) -> None:
        """A replica of `model` that has loaded lives. Nodes that join are warmed while any says so."""
        self._want(model)
        self._barrier.present(member, probe)

    def _want(self, model: ModelConfig) -> None:
        self._wanted[model.model_dump_json()] = (model, time.monotonic())
        self._start_tending()

    async def probe(self, model: str, fingerprint: str) -> TokenBatch:
        """What a tokenizer replica of that version of the model has encoded; waits until there is one."""
        return await self._barrier.probe(model, fingerprint)

    async def enter(self, member: Member, probe: TokenBatch | None) -> None:
        """Wait until a replica may become ready without an old version being lost to it."""
        await self._barrier.enter(member, probe)

    async def pid(self) -> int:
        return os.getpid()

    async def status(self) -> list[ModelOnNode]:
        """Every model on every node that is alive and that this warmer has looked at."""
        alive = await asyncio.to_thread(alive_nodes)
        known = {where: status for where, status in self._status.items() if status.node_id in alive}
        return list(await asyncio.gather(*(self._look(where, status) for where, status in known.items())))

    async def _look(self, where: tuple[str, str], known: ModelOnNode) -> ModelOnNode:
        site, key = self._sites.get(known.node_id), self._keys.get(where)
        if known.phase != "pending" or site is None or key is None:
            return known
        try:
            progress = await within(site.progress(key), _SURVEY_S)
        except Exception as error:
            return replace(known, error=f"{type(error).__name__}: the node does not answer")
        return known if progress is None else known.at(progress)

    async def _once(self, model: ModelConfig, node_id: str, in_full: bool) -> str:
        """As `_bring`, shared by all that ask for the same model on the same node at the same time."""
        self._start_tending()
        key = (model.model_dump_json(), node_id)
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._bring(model, node_id, in_full))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(task)

    async def _bring(self, model: ModelConfig, node_id: str, in_full: bool) -> str:
        where = (model.name, node_id)
        address = (await self._site(node_id)).address
        self._status.setdefault(where, ModelOnNode(node_id, address, model.name, model.revision or "", "pending"))
        try:
            path = await self._retried(model, node_id, in_full)
        except Exception as error:
            reason = error.message if isinstance(error, CacheError) else f"{type(error).__name__}: {error}"
            self._note(where, phase="error", error=reason)
            raise
        self._note(where, phase="ready", bytes_done=self._status[where].bytes_total, error=None)
        return path

    def _note(self, where: tuple[str, str], **changes: Any) -> None:
        self._status[where] = replace(self._status[where], **changes)

    async def _retried(self, model: ModelConfig, node_id: str, in_full: bool) -> str:
        """Again with a new depot if the node's is lost. Raises SourceUnavailableError if the node is."""
        for tries_left in reversed(range(_DEPOT_TRIES)):
            site = await self._site(node_id)
            try:
                return await self._within_time(model, node_id, site, in_full)
            except Exception as error:
                if not is_lost(error):
                    raise
                self._drop(node_id, site)
                if not tries_left or node_id not in await asyncio.to_thread(alive_nodes):
                    raise SourceUnavailableError(f"node {site.address} was lost: {error}") from error
                await asyncio.sleep(_RETRY_S)
        raise AssertionError("the last try returns or raises")

    async def _within_time(self, model: ModelConfig, node_id: str, site: RemoteSite, in_full: bool) -> str:
        limit_s = self._cache.download_timeout_s
        try:
            return await within(self._bring_now(model, node_id, site, in_full), limit_s)
        except asyncio.TimeoutError:
            raise SourceUnavailableError(
                f"node {site.address}: {model.name} was not there after {limit_s:g} s (cache.download_timeout_s)"
            ) from None

    async def _bring_now(self, model: ModelConfig, node_id: str, site: RemoteSite, in_full: bool) -> str:
        if is_direct(model, self._cache):
            return await site.direct(model)
        delivery = await self._delivery(model, node_id)
        manifest = delivery.manifest
        where = (model.name, node_id)
        self._keys[where] = (manifest.name, manifest.revision)
        self._note(where, revision=manifest.revision, bytes_total=manifest.total_bytes)
        path = await site.open(manifest, in_full)
        if path is not None:
            delivery.has(node_id)
            return path
        self._note(where, phase="pending", error=None)
        return await delivery.bring(node_id)

    async def _delivery(self, model: ModelConfig, node_id: str) -> Delivery:
        """The delivery of `model`; a new one if there is none yet or the source failed in the last one."""
        key = model.model_dump_json()
        task = self._deliveries.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() or task.result().failure)):
            task = self._deliveries[key] = asyncio.create_task(self._start_delivery(model, node_id))
        return await asyncio.shield(task)

    async def _start_delivery(self, model: ModelConfig, node_id: str) -> Delivery:
        """Find out what `model` consists of, from a node that has it or from its source, and who has it."""
        nodes = await asyncio.to_thread(alive_nodes)
        found = await self._survey(nodes, lambda site: site.find(model)) if model.revision is not None else {}
        manifest, reader = next(iter(found.values()), None), None
        if manifest is None:
            manifest, reader = await self._resolve(model, [node_id, *nodes])
        delivery = Delivery(manifest, lambda node: self._sites[node])
        if reader is not None and model.revision is None:
            self._bring_to_reader(delivery, model, reader)
        for node in await self._survey(nodes, lambda site: site.open(manifest, False)):
            delivery.has(node)
        return delivery

    def _bring_to_reader(self, delivery: Delivery, model: ModelConfig, node: str) -> None:
        """A folder may be on that node only, so the model goes there too, whoever asked for it."""
        delivery.expect(node)
        bringing = asyncio.create_task(self._once(model, node, False))
        bringing.add_done_callback(lambda task: delivery.lost(node) if task.cancelled() or task.exception() else None)

    async def _survey(self, nodes: Sequence[str] | dict[str, str], ask: Callable[[RemoteSite], Any]) -> dict[str, Any]:
        """Node → answer, of those that answer with something in time."""

        async def one(node: str) -> Any:
            return await within(ask(await self._site(node)), _SURVEY_S)

        answers = await asyncio.gather(*(one(node) for node in nodes), return_exceptions=True)
        return {n: a for n, a in zip(nodes, answers, strict=True) if a is not None and not isinstance(a, BaseException)}

    async def _resolve(self, model: ModelConfig, nodes: Sequence[str]) -> tuple[Manifest, str]:
        """Ask the source on the first of `nodes` that has it; the manifest, and which one that is.

        A repository that the Hub lacks is missing for all.
        """
        missing: SourceNotFoundError | None = None
        for node in nodes:
            try:
                return await (await self._site(node)).resolve(model), node
            except SourceNotFoundError as error:  # noqa: PERF203
                missing = missing or error
                if model.revision is not None:
                    break
        assert missing is not None, "there is at least the node that asks"
        raise missing

    async def _site(self, node_id: str) -> RemoteSite:
        if node_id not in self._sites:
            address = (await asyncio.to_thread(alive_nodes)).get(node_id)
            if address is None:
                raise SourceUnavailableError(f"node {node_id} is not alive")
            self._sites.setdefault(node_id, RemoteSite(node_id, address, self._cache))
        return self._sites[node_id]

    def _drop(self, node_id: str, site: RemoteSite) -> None:
        """Forget a lost depot, unless a new one has taken its place already."""
        if self._sites.get(node_id) is site:
            del self._sites[node_id]
            for task in self._deliveries.values():
                if task.done() and not task.cancelled() and task.exception() is None:
                    task.result().lost(node_id)

    def _start_tending(self) -> None:
        if self._tending is None or self._tending.done():  # done: the cluster did not answer for a while
            self._tending = asyncio.create_task(self._tend())

    async def _tend(self) -> None:
        """Warm new nodes, keep the metrics up to date, and end the depots when there is nothing to do for them."""
        idle_s = 0.0
        while True:
            await asyncio.sleep(_TEND_S)
            self._forget_unwanted()
            await self._warm_newcomers()
            for status in await self.status():
                self._export(status)
            idle_s = 0.0 if self._under_way else idle_s + _TEND_S
            if idle_s >= _IDLE_S:
                self._end_depots()
                if self._outlives_its_maker and not self._wanted:
                    ray.kill(ray.get_runtime_context().current_actor)

    def _forget_unwanted(self) -> None:
        now = time.monotonic()
        self._wanted = {key: (model, said) for key, (model, said) in self._wanted.items() if now - said < _WANTED_S}

    async def _warm_newcomers(self) -> None:
        """Start bringing what is wanted to nodes that have not been looked at; what fails there is in the status."""
        nodes = await asyncio.to_thread(alive_nodes)
        for model, _ in self._wanted.values():
            for node in nodes:
                if (model.name, node) not in self._status:
                    bringing = asyncio.create_task(self._once(model, node, False))
                    bringing.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _end_depots(self) -> None:
        self._deliveries.clear()
        for site in self._sites.values():
            site.close()
        self._sites.clear()

    def _export(self, status: ModelOnNode) -> None:
        labels = {"model": status.model, "node": status.address}
        self._metrics.bytes_here.set(status.bytes_done, labels)
        self._metrics.bytes_total.set(status.bytes_total, labels)
        for phase in PHASES:
            self._metrics.phase.set(float(phase == status.phase), {**labels, "phase": phase})


def alive_nodes() -> dict[str, str]:
    """Node id → address, of the nodes that are alive."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


async def open_gate(models: list[dict[str, Any]], cache: dict[str, Any]) -> bool:
    """Wait until every node has `models`. For deployment actors. Raises CacheError.

    Returns whether this gate may end: Serve has not made it again after one that ended.
    """
    here = CacheConfig.model_validate(cache)
    await ask_warmer(APPLICATIONS, here, "warm", [ModelConfig.model_validate(model) for model in models])
    application, deployment, version = (os.environ[name] for name in DEPLOYMENT_VARIABLES)
    is_first: bool = await ask_warmer(APPLICATIONS, here, "pass_gate", f"{application}#{deployment}", version)
    return is_first


def restart_warmer(of: str, cache: CacheConfig) -> None:
    """End a warmer that hangs. Ray starts it again."""
    warmer = _held.get(_place(of, cache))
    if warmer is not None:
        logger.warning("the warmer does not answer; it is started again")
        ray.kill(warmer, no_restart=False)


async def ask_warmer(of: str, cache: CacheConfig, method: str, *arguments: Any) -> Any:
    """Call the warmer of that name, made now if there is none, again if it dies meanwhile. Raises CacheError."""
    while True:
        warmer = await asyncio.to_thread(_warmer, of, cache)
        try:
            return await getattr(warmer, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, CacheError):
                raise error.cause from None
            raise
        except RayActorError:
            _held.pop(_place(of, cache), None)
            await asyncio.sleep(_RETRY_S)


def _warmer(of: str, cache: CacheConfig) -> Any:
    place = _place(of, cache)
    if place not in _held:
        is_shared = of == APPLICATIONS
        options = {
            "name": place[-1],
            "namespace": NAMESPACE,
            "get_if_exists": True,
            "resources": ON_HEAD,
            "num_cpus": 0,
            "lifetime": "detached" if is_shared else None,
        }
        actor = ray.remote(Warmer).options(**options, max_restarts=-1, max_task_retries=-1, max_concurrency=10_000)
        _held[place] = actor.remote(cache, is_shared)
    return _held[place]


def _place(of: str, cache: CacheConfig) -> tuple[str, str, str]:
    here = ray.get_runtime_context()
    return here.get_node_id(), here.get_worker_id(), warmer_name(of, cache)


def warmer_name(of: str, cache: CacheConfig) -> str:
    """Differs with the cache's configuration, so that a changed one does not meet a warmer that has the old."""
    digest = hashlib.sha256(cache.model_dump_json().encode()).hexdigest()[:12]
    return f"warmer::{of}::{digest}"

"""The actor on each node that takes and gives pieces of models, and how the warmer reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.cache.delivery import NodeLostError, Site
from serve_app.cache.disk import ProcessMark
from serve_app.cache.manifest import Manifest
from serve_app.cache.node import Bytes, Key, NodeCache
from serve_app.cache.status import Progress
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import CacheError

ResultT = TypeVar("ResultT")

_THREADS = 64


class Depot:
    """A NodeCache as an async actor: its loop always answers, the work is done in threads."""

    def __init__(self, cache: CacheConfig) -> None:
        self._cache = cache
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="depot")

    @cached_property
    def _node(self) -> NodeCache:
        """Made at the first call, so that what is wrong with the root reaches the caller as it is."""
        return NodeCache(self._cache)

    async def call(self, method: str, *arguments: Any) -> Any:
        """A method of NodeCache."""
        return await self._in_thread(lambda: getattr(self._node, method)(*arguments))

    async def pull(self, key: Key, path: str, index: int, offset: int, length: int, holder: Any) -> bool:
        """Take a piece from the depot `holder`; False if that could not give it."""
        try:
            data = await holder.give.remote(key, path, offset, length)
        except (RayError, CacheError):
            return False
        await self._in_thread(lambda: self._node.write(key, index, offset, data))
        return True

    async def give(self, key: Key, path: str, offset: int, length: int) -> Bytes:
        return await self._in_thread(lambda: self._node.read(key, path, offset, length))

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class RemoteSite:
    """A node's depot, as deliveries and the warmer see it. Errors name the node.

    The depot is made when it is first needed. Raises RayError if node or depot are lost, which `is_lost` tells.
    """

    def __init__(self, node_id: str, address: str, cache: CacheConfig) -> None:
        self.address = address
        affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": affinity}
        self.actor = ray.remote(Depot).options(**options).remote(cache)

    def close(self) -> None:
        ray.kill(self.actor)

    async def find(self, model: ModelConfig) -> Manifest | None:
        answer: Manifest | None = await self._call("find", model)
        return answer

    async def resolve(self, model: ModelConfig) -> Manifest:
        answer: Manifest = await self._call("resolve", model)
        return answer

    async def direct(self, model: ModelConfig) -> str:
        return str(await self._call("direct", model))

    async def open(self, manifest: Manifest, in_full: bool) -> str | None:
        path = await self._call("open", manifest, in_full)
        return None if path is None else str(path)

    async def lease(self, key: Key, process: ProcessMark) -> None:
        await self._call("lease", *key, process)

    async def progress(self, key: Key) -> Progress | None:
        answer: Progress | None = await self._call("progress", key)
        return answer

    async def begin(self, manifest: Manifest) -> list[int]:
        answer: list[int] = await self._call("begin", manifest)
        return answer

    async def fetch(self, key: Key, files: Sequence[int]) -> None:
        await self._call("fetch", key, files)

    async def checked(self, key: Key) -> list[int]:
        answer: list[int] = await self._call("checked", key)
        return answer

    async def pull(self, key: Key, path: str, file: int, offset: int, length: int, holder: Site) -> bool:
        assert isinstance(holder, RemoteSite)
        came: bool = await self._ask(self.actor.pull.remote(key, path, file, offset, length, holder.actor))
        return came

    async def verify(self, key: Key, file: int) -> bool:
        answer: bool = await self._call("verify", key, file)
        return answer

    async def finish(self, key: Key) -> str:
        return str(await self._call("finish", key))

    async def abandon(self, key: Key) -> None:
        await self._call("abandon", key)

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await self._ask(self.actor.call.remote(method, *arguments))

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CacheError):
                raise type(cause)(f"node {self.address}: {cause.message}", retry_after_s=cause.retry_after_s) from None
            raise


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that a node or its depot is gone, not that something went wrong on it."""
    return isinstance(error, NodeLostError) or (isinstance(error, RayError) and not isinstance(error, RayTaskError))

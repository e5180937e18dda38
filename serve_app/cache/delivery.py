"""One model, brought to the nodes of a cluster: read from its source once, then passed from node to node."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from serve_app.cache.manifest import Manifest
from serve_app.cache.node import Key
from serve_app.cache.swarm import CHUNK_BYTES, Pull, Swarm
from serve_app.config import source_kind
from serve_app.errors import CacheError, DiskFullError, IncompleteModelError, SourceNotFoundError
from serve_app.timeouts import within

logger = logging.getLogger(__name__)

PULLS_PER_NODE = 4
"""Pieces that one node takes at a time."""
ALTERED_LIMIT = 3
"""So often may a file arrive altered on one node before the delivery there fails."""
_LOOK_S = 0.25


class NodeLostError(Exception):
    """The node went away meanwhile; it can be tried again if it comes back."""


class Site(Protocol):
    """What a node does for a delivery; see NodeCache, whose methods these are. Each may raise CacheError."""

    async def begin(self, manifest: Manifest) -> list[int]: ...

    async def fetch(self, key: Key, files: Sequence[int]) -> None: ...

    async def checked(self, key: Key) -> list[int]: ...

    async def pull(self, key: Key, path: str, file: int, offset: int, length: int, holder: Site) -> bool:
        """Take a piece from `holder`; False if that could not give it."""

    async def verify(self, key: Key, file: int) -> bool: ...

    async def finish(self, key: Key) -> str: ...

    async def abandon(self, key: Key) -> None: ...


class Delivery:
    """Brings `manifest` to any number of nodes, also to such that come later.

    The first node that lacks a file which no other has reads it from the source. If it is lost meanwhile, the next one
    does. An error of the source itself ends the delivery for all; it is then not to be used again.
    """

    def __init__(self, manifest: Manifest, site: Callable[[str], Site], chunk_bytes: int = CHUNK_BYTES) -> None:
        self.manifest = manifest
        self.failure: CacheError | None = None
        self._key = (manifest.name, manifest.revision)
        self._site = site
        self._swarm = Swarm([file.size for file in manifest.files], chunk_bytes)
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._reader: str | None = None
        self._without_source: dict[str, CacheError] = {}
        self._expected: set[str] = set()
        self._own_failures: dict[str, Exception] = {}
        self._altered: Counter[tuple[str, int]] = Counter()

    def has(self, node: str) -> None:
        """`node` has a complete copy, and can give it."""
        self._swarm.join(node, range(len(self.manifest.files)))
        self._stir()

    def lost(self, node: str) -> None:
        """`node` is gone, or has no copy any more."""
        self._swarm.leave(node)
        self._expected.discard(node)
        self._judge_source()
        self._stir()

    def expect(self, node: str) -> None:
        """`node` can read the source, and will be brought to: until then no other's failure to find it counts."""
        self._expected.add(node)

    async def bring(self, node: str) -> str:
        """Put the model on `node`; its folder there. Raises CacheError."""
        site = self._site(node)
        self._own_failures.pop(node, None)
        workers: list[asyncio.Task[None]] = []
        try:
            self._swarm.join(node, await site.begin(self.manifest))
            self._stir()
            workers += [asyncio.create_task(self._work(node, site)) for _ in range(PULLS_PER_NODE)]
            await asyncio.gather(*workers)
            if self._reader == node and self._reading is not None:  # which looks at what has been checked until its end
                await asyncio.wait({self._reading})
            return await site.finish(self._key)
        except BaseException:
            await self._give_up(node, site, workers)
            raise

    async def _give_up(self, node: str, site: Site, workers: Sequence[asyncio.Task[None]]) -> None:
        tasks = [*workers, self._reading] if self._reader == node and self._reading is not None else list(workers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.lost(node)
        with suppress(Exception):  # the node may be gone; what it holds is found again if it is not
            await site.abandon(self._key)

    async def _work(self, node: str, site: Site) -> None:
        """Take pieces until there is nothing left to take; several of these run for one node."""
        while True:
            self._raise_failure(node)
            if self._swarm.is_complete(node):
                return
            pull = self._swarm.take(node)
            if pull is not None:
                await self._pull(node, site, pull)
            else:
                self._read_source(node)
                await self._wait()

    def _raise_failure(self, node: str) -> None:
        failure = self._own_failures.get(node) or self.failure
        if failure is not None:
            raise failure
        if node not in self._swarm.members():
            raise NodeLostError(f"node {node} was lost while {self.manifest.name} was brought to it")

    async def _pull(self, node: str, site: Site, pull: Pull) -> None:
        chunk = self._swarm.chunks[pull.chunk]
        try:
            path = self.manifest.files[chunk.file].path
            holder = self._site(pull.holder)
            came = await site.pull(self._key, path, chunk.file, chunk.offset, chunk.length, holder)
        except BaseException:
            self._swarm.failed(node, pull, by_holder=False)
            raise
        if not came:
            self._swarm.failed(node, pull, by_holder=True)
        elif self._swarm.arrived(node, pull):
            await self._check(node, site, chunk.file)
        self._stir()

    async def _check(self, node: str, site: Site, file: int) -> None:
        if await site.verify(self._key, file):
            self._swarm.has_file(node, file)
            return
        self._swarm.lacks_file(node, file)
        self._altered[node, file] += 1
        path = self.manifest.files[file].path
        logger.warning("%s arrived altered on node %s; taking it again from one that has checked its own", path, node)
        if self._altered[node, file] >= ALTERED_LIMIT:
            raise IncompleteModelError(f"{self.manifest.name}: {path} arrived altered {ALTERED_LIMIT} times")

    def _read_source(self, node: str) -> None:
        """Let `node` read what no member has, unless some node does already or `node` cannot."""
        if self._reading is not None or node in self._without_source:
            return
        files = self._swarm.uncovered()
        if files:
            self._reader = node
            self._reading = asyncio.create_task(self._read(node, files))

    async def _read(self, node: str, files: list[int]) -> None:
        site = self._site(node)
        fetching = asyncio.ensure_future(site.fetch(self._key, files))
        try:
            while not fetching.done():
                await asyncio.wait({fetching}, timeout=_LOOK_S)
                await self._note_checked(node, site)
            fetching.result()
        except SourceNotFoundError as error:
            self._source_missing(node, error)
        except CacheError as error:
            if isinstance(error, DiskFullError):
                self._own_failures[node] = error
            else:
                self.failure = error
        except Exception as error:  # the node is lost: whoever brings to it learns why, and another node reads
            self._own_failures[node] = error
        finally:
            fetching.cancel()
            self._reader = self._reading = None
            self._stir()

    async def _note_checked(self, node: str, site: Site) -> None:
        for file in await site.checked(self._key):
            self._swarm.has_file(node, file)
        self._stir()

    def _source_missing(self, node: str, error: SourceNotFoundError) -> None:
        self._without_source[node] = error
        self._judge_source()

    def _judge_source(self) -> None:
        """A folder may be missing on one node and there on another, which may come yet; the Hub is the same for all."""
        might_have_it = {*self._swarm.members(), *self._expected} - set(self._without_source)
        if self._without_source and (source_kind(self.manifest.source) == "hub" or not might_have_it):
            self.failure = next(iter(self._without_source.values()))

    def _stir(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self) -> None:
        """Until something has changed; also now and then without, so that no lost event can stop a delivery."""
        with suppress(asyncio.TimeoutError):
            await within(self._changed.wait(), 1.0)

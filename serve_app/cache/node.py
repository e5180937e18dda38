"""One node's part: what it has, what arrives on it, and what it can give to others. No Ray in here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.cache.disk import ProcessMark, disk_errors, ran_full, refuse_network_filesystem
from serve_app.cache.environment import warn_of_dead_settings
from serve_app.cache.fetch import fetch
from serve_app.cache.hub import Hub
from serve_app.cache.leases import Leases, leases_below
from serve_app.cache.manifest import Found, Manifest, ModelFile, check_content, check_shards
from serve_app.cache.resolve import files_in, resolve, selection_of, source_folder
from serve_app.cache.space import make_room
from serve_app.cache.staging import Staging
from serve_app.cache.status import Phase, Progress
from serve_app.cache.store import Store, expand, modification_times
from serve_app.config import CacheConfig, ModelConfig, source_kind
from serve_app.errors import CacheError, DiskFullError, IncompleteModelError, SourceNotFoundError
from serve_app.paths import below

logger = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]
Key: TypeAlias = tuple[str, str]
"""(name, revision) of a model."""

_LOOK_S = 0.2
"""How often a source's progress is looked at."""


@dataclass(slots=True)
class Arrival:
    """A model on its way to this node."""

    manifest: Manifest
    staging: Staging
    checked: dict[int, ModelFile]
    """Files that are here and right, by index, with their hashes."""
    hub: Hub
    started_at: float = field(default_factory=time.monotonic)
    received: dict[int, int] = field(default_factory=dict)
    """Bytes that came from other nodes, by file."""
    phase: Phase = "downloading"
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        return self.staging.folder

    def progress(self) -> Progress:
        return Progress(self.phase, self._bytes_here(), time.monotonic() - self.started_at)

    def bytes_to_come(self) -> int:
        """Bytes of the model that the disk does not hold, nor has set aside, yet."""
        return max(0, self.manifest.total_bytes - self.staging.bytes_on_disk())

    def _bytes_here(self) -> int:
        """Bytes of the model that are on this node's disk."""
        if self.received:
            whole = sum(file.size for file in self.checked.values())
            return whole + sum(size for index, size in self.received.items() if index not in self.checked)
        return min(self.staging.bytes_on_disk(), self.manifest.total_bytes)


class NodeCache:
    """The models of one node. Methods block; calls for different models and files may come from many threads."""

    def __init__(self, cache: CacheConfig) -> None:
        """Raises CacheError if the root cannot be used on this node."""
        warn_of_dead_settings()
        root = expand(cache.root)
        if not cache.allow_network_filesystem:
            refuse_network_filesystem(root)
        self._cache = cache
        self._store = Store(root)
        with disk_errors("the cache", root):
            self._store.sweep()
        self._leases = Leases(leases_below(root))
        self._wanted: set[tuple[str, str]] = set()
        self._arrivals: dict[tuple[str, str], Arrival] = {}
        self._known: dict[Key, Mapping[str, Found]] = {}
        """What this process has read of files that are not in a complete copy, and that `begin` need not read again."""
        self._space = threading.Lock()

    def find(self, model: ModelConfig) -> Manifest | None:
        """What a pinned commit consists of, from the marker of a copy by the rule that `model` has; no request.

        The copy's files are not looked at (reading them may take minutes): `open` does that.
        """
        if model.revision is None:
            return None
        try:
            manifest = self._store.marker(model.name, model.revision).manifest
        except IncompleteModelError:
            return None
        same = (manifest.source, manifest.selection) == (model.source, selection_of(model))
        return manifest if same else None

    def resolve(self, model: ModelConfig) -> Manifest:
        """Ask the source. Raises CacheError."""
        return resolve(model, self._hub())

    def _hub(self) -> Hub:
        return Hub(self._cache.download_timeout_s, offline=self._cache.offline)

    def direct(self, model: ModelConfig) -> Path:
        """The source directory itself, which is served from without a copy.

        Raises SourceNotFoundError or IncompleteModelError.
        """
        folder = source_folder(model.source)
        check_shards(folder, files_in(folder, model))
        return folder

    def open(self, manifest: Manifest, in_full: bool = False) -> Path | None:
        """The folder of a complete copy, or None if there is none (or a broken one, which is said in the log)."""
        key = name, revision = manifest.name, manifest.revision
        self._wanted.add(key)
        try:
            found = self._store.inspect(name, revision, in_full=in_full)
        except IncompleteModelError as error:
            self._condemn(key, error.message)
            return None
        self._known[key] = found.right
        if found.fault is not None:
            self._condemn(key, found.fault)
            return None
        if not {file.path for file in manifest.files} <= {file.path for file in found.manifest.files}:
            return None
        del self._known[key]
        self._store.touch(name, revision)
        return self._store.path(name, revision)

    def _condemn(self, key: Key, fault: str) -> None:
        if self._store.path(*key).exists():
            logger.warning("%s; fetching what is wrong again", fault)
            self._store.condemn(*key)

    def lease(self, name: str, revision: str, process: ProcessMark) -> None:
        """Keep that revision from being removed as long as `process` lives."""
        self._leases.take(name, revision, process)

    def begin(self, manifest: Manifest) -> list[int]:
        """Get ready to receive; the indices of files that are here already, from an earlier try or a broken copy.

        Files of a package that is installed here with the same content are copied from it.
        Raises DiskFullError if what is missing does not fit.
        """
        key = (manifest.name, manifest.revision)
        self.abandon(key)
        with self._disk_errors(manifest):
            self._store.root.mkdir(parents=True, exist_ok=True)
            staging = self._store.stage(manifest)
            try:
                # Reading what is here takes minutes for a large model, in which others may begin too.
                held = staging.held(manifest.files, self._known.pop(key, {}))
            except BaseException:
                staging.leave()
                raise
            arrival = Arrival(manifest, staging, held, self._hub())
            try:
                with self._space:
                    self._make_room(arrival)
                    self._arrivals[key] = arrival
            except CacheError:
                self._leave(key, arrival)
                raise
        if source_kind(manifest.source) == "package":
            try:
                self._copy_own(arrival)
            except CacheError:
                self.abandon(key)
                raise
        return sorted(arrival.checked)

    def _make_room(self, arrival: Arrival) -> None:
        """For what is missing of it, beside what the models that are arriving already will take yet."""
        files = arrival.manifest.files
        missing = sum(file.size for index, file in enumerate(files) if index not in arrival.checked)
        promised = sum(other.bytes_to_come() for other in list(self._arrivals.values()))
        others = f" (with {promised} bytes for models that are arriving)" if promised else ""
        kept = self._leases.in_use() | self._wanted
        make_room(self._store, self._cache, kept, arrival.manifest.name + others, missing + promised)

    def _copy_own(self, arrival: Arrival) -> None:
        with suppress(SourceNotFoundError), self._disk_errors(arrival.manifest):
            folder = source_folder(arrival.manifest.source)
            for index, file in enumerate(arrival.manifest.files):
                source = folder / file.path
                if index not in arrival.checked and source.is_file() and source.stat().st_size == file.size:
                    fetch(arrival.manifest, [file], arrival.folder, arrival.hub)
                    self._check(arrival, index)

    def fetch(self, key: Key, indices: Sequence[int]) -> None:
        """Take files from the source; each is checked as soon as it is there, and asked for twice if it is wrong.

        Raises CacheError.
        """
        arrival = self._arrival(key)
        wrong = self._fetch_once(arrival, indices)
        if wrong and self._fetch_once(arrival, wrong):
            path = arrival.manifest.files[wrong[0]].path
            raise IncompleteModelError(
                f"{arrival.manifest.source}: {path} is altered: the source gives another content than it says it has"
            )

    def _fetch_once(self, arrival: Arrival, indices: Sequence[int]) -> list[int]:
        """The indices of files that came wrong; they are removed again."""
        waiting = list(indices)
        wrong: list[int] = []
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as thread:
            fetching = thread.submit(self._fetch, arrival, [arrival.manifest.files[index] for index in indices])
            while waiting:
                done = not wait([fetching], _LOOK_S).not_done
                here = [i for i in waiting if done or (arrival.folder / arrival.manifest.files[i].path).exists()]
                if done:
                    fetching.result()
                wrong += [index for index in here if not self._check(arrival, index)]
                waiting = [index for index in waiting if index not in here]
        return wrong

    def _fetch(self, arrival: Arrival, files: Sequence[ModelFile]) -> None:
        manifest = arrival.manifest
        try:
            with self._disk_errors(manifest):
                fetch(manifest, files, arrival.folder, arrival.hub)
        except DiskFullError as error:  # the Hub's process does not know what and where
            raise ran_full(_sized(manifest), self._store.root) from error

    def verify(self, key: Key, index: int) -> bool:
        """Read a file all pieces of which have come. If it is not what was pinned, it is removed, and False."""
        return self._check(self._arrival(key), index)

    def _check(self, arrival: Arrival, index: int) -> bool:
        file = arrival.manifest.files[index]
        arrival.phase = "verifying"
        try:
            arrival.checked[index] = check_content(arrival.folder, file)
        except IncompleteModelError as error:
            logger.warning("%s", error)
            (arrival.folder / file.path).unlink(missing_ok=True)
            arrival.received.pop(index, None)
            return False
        finally:
            arrival.phase = "downloading"
        return True

    def checked(self, key: Key) -> list[int]:
        """Indices of the files that are here and right."""
        return sorted(self._arrival(key).checked)

    def write(self, key: Key, index: int, offset: int, data: Bytes) -> None:
        """Put a piece of a file, which came from another node, at its place."""
        arrival = self._arrival(key)
        file = arrival.manifest.files[index]
        with self._disk_errors(arrival.manifest):
            with arrival.lock:
                if index not in arrival.received:
                    arrival.staging.prepare(file)
                    arrival.received[index] = 0
            with (arrival.folder / file.path).open("rb+") as stream:
                stream.seek(offset)
                stream.write(data.data)
        with arrival.lock:
            arrival.received[index] += len(data)

    def read(self, key: Key, path: str, offset: int, length: int) -> Bytes:
        """A piece of a file of a complete copy, or of one that is arriving. Raises IncompleteModelError."""
        for folder in self._places(key):
            try:
                data = np.fromfile(below(folder, path), np.uint8, count=length, offset=offset)
            except FileNotFoundError:
                continue
            if len(data) == length:
                return data
        raise IncompleteModelError(f"{key[0]}: this node has no {path} to give")

    def _places(self, key: Key) -> Iterator[Path]:
        if key in self._arrivals:
            yield self._arrivals[key].folder
        yield self._store.path(*key)

    def finish(self, key: Key) -> Path:
        """Publish. Raises IncompleteModelError if anything is missing."""
        arrival = self._arrival(key)
        files = arrival.manifest.files
        missing = [file.path for i, file in enumerate(files) if i not in arrival.checked]
        if missing:
            raise IncompleteModelError(f"{key[0]}: {', '.join(missing)} did not arrive")
        complete = replace(arrival.manifest, files=tuple(arrival.checked[i] for i in range(len(files))))
        check_shards(arrival.folder, {file.path for file in complete.files})
        with self._disk_errors(complete):
            path = self._store.publish(arrival.staging, complete)
        del self._arrivals[key]
        return path

    def abandon(self, key: Key) -> None:
        """Give up for now; what is here stays for the next try."""
        arrival = self._arrivals.pop(key, None)
        if arrival is not None:
            arrival.hub.cancel()
            self._leave(key, arrival)

    def _leave(self, key: Key, arrival: Arrival) -> None:
        """Leave what is here to the next try, and keep in mind what of it is right."""
        with suppress(OSError):
            right = list(arrival.checked.values())
            times = modification_times(arrival.folder, right)
            self._known[key] = {file.path: Found(file, times[file.path]) for file in right}
        arrival.staging.leave()

    def progress(self, key: Key) -> Progress | None:
        """How far a model is that is arriving; None if none of that name and revision is."""
        arrival = self._arrivals.get(key)
        return None if arrival is None else arrival.progress()

    def arriving(self) -> list[tuple[Manifest, Progress]]:
        """All models that are on their way."""
        return [(arrival.manifest, arrival.progress()) for arrival in list(self._arrivals.values())]

    def _arrival(self, key: Key) -> Arrival:
        try:
            return self._arrivals[key]
        except KeyError:
            raise IncompleteModelError(f"{key[0]}: nothing was begun on this node") from None

    @contextmanager
    def _disk_errors(self, manifest: Manifest) -> Iterator[None]:
        with disk_errors(_sized(manifest), self._store.root):
            yield


def _sized(manifest: Manifest) -> str:
    return f"{manifest.name} ({manifest.total_bytes} bytes)"


def warm_this_node(model: ModelConfig, cache: CacheConfig, node: NodeCache | None = None) -> Path:
    """The folder with the complete model on this node, taken from the source now if it is not there yet.

    Idempotent, and safe to call from several processes at once. A pinned commit that is complete costs no request.
    Raises CacheError.
    """
    node = node or NodeCache(cache)
    if is_direct(model, cache):
        return node.direct(model)
    manifest = node.find(model) or node.resolve(model)
    path = node.open(manifest, in_full=cache.verify == "sha256")
    if path is not None:
        return path
    key = (manifest.name, manifest.revision)
    held = node.begin(manifest)
    try:
        node.fetch(key, [index for index in range(len(manifest.files)) if index not in held])
        return node.finish(key)
    except BaseException:
        node.abandon(key)
        raise


def is_direct(model: ModelConfig, cache: CacheConfig) -> bool:
    """Whether `model` is served from its source directory, without a copy."""
    return cache.directory_mode == "direct" and source_kind(model.source) == "directory"

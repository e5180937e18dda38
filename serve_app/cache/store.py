"""One node's folder of models: `<root>/<model name>/<revision>/`, each complete or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from serve_app.cache.disk import boot_id
from serve_app.cache.manifest import Found, Manifest, Marker, ModelFile, check_content, check_size
from serve_app.cache.staging import STAGED, Staging, is_abandoned
from serve_app.errors import IncompleteModelError

READY = ".ready"
"""The marker of a complete copy. Written after every file, so that where it is, all is."""

_KEPT_S = 24 * 3600.0


def expand(path: str) -> Path:
    """`~` and `$VARIABLES` of this node put in. Raises IncompleteModelError if one of them means nothing here."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise IncompleteModelError(f"{path}: there is no such home on this node; set HOME, or write the path in full")
    if "$" in expanded:
        raise IncompleteModelError(f"{path}: a variable in it is not set on this node")
    return Path(expanded).absolute()


def model_path(root: Path, name: str, revision: str) -> Path:
    """Where that revision of that model lies on a node, once it is ready."""
    return root / name / revision


@dataclass(frozen=True, slots=True)
class Copy:
    """A ready copy as eviction sees it; `used_at` is in seconds since the epoch."""

    name: str
    revision: str
    bytes: int
    used_at: float


@dataclass(frozen=True, slots=True)
class Inspected:
    """A copy that was looked at."""

    manifest: Manifest
    right: Mapping[str, Found]
    """Files by path that were read and are right, or have not been touched since they were."""
    fault: str | None
    """The first thing that is wrong; None if the copy is complete."""


class Store:
    """Reads and publishes models below one root. Any number of processes may use one root at the same time.

    A writer fills a folder of its own and publishes it by one rename: of two that race, the second finds the first's
    complete copy and throws its own away. No lock is held, so none can be left behind or be without effect on a
    network filesystem.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, revision: str) -> Path:
        return model_path(self.root, name, revision)

    def marker(self, name: str, revision: str) -> Marker:
        """Raises IncompleteModelError if there is no copy with a marker that can be read."""
        folder = self.path(name, revision)
        try:
            return Marker.from_json((folder / READY).read_text("utf-8"))
        except FileNotFoundError:
            raise IncompleteModelError(f"{folder}: no {READY} marker") from None
        except ValueError as error:
            raise IncompleteModelError(f"{folder}: the {READY} marker cannot be read: {error}") from error

    def check(self, name: str, revision: str, *, in_full: bool = False) -> Manifest:
        """The manifest of a copy that is complete. Raises IncompleteModelError, saying what is wrong."""
        inspected = self.inspect(name, revision, in_full=in_full)
        if inspected.fault is not None:
            raise IncompleteModelError(inspected.fault)
        return inspected.manifest

    def inspect(self, name: str, revision: str, *, in_full: bool = False) -> Inspected:
        """What is right and what is wrong with a copy.

        Marker and sizes are looked at always; a file is read if its modification time has moved, all are if `in_full`
        or after a reboot, which may have come before everything was on the disk.
        Raises IncompleteModelError if there is no marker that can be read.
        """
        folder = self.path(name, revision)
        marker = self.marker(name, revision)
        fault, present = None, []
        for file in marker.manifest.files:
            try:
                check_size(folder, file)
                present.append(file)
            except IncompleteModelError as error:  # noqa: PERF203
                fault = fault or error.message
        times = modification_times(folder, present)
        known = {} if in_full or marker.boot_id != boot_id() else marker.modified_ns
        doubtful = {path for path, time_ns in times.items() if time_ns != known.get(path)}
        right = {}
        for file in present:
            try:
                if file.path in doubtful:
                    check_content(folder, file)
                right[file.path] = Found(file, times[file.path])
            except IncompleteModelError as error:  # noqa: PERF203
                fault = fault or error.message
        if doubtful and fault is None:
            with suppress(OSError):  # a cache that is mounted read-only is checked again next time
                write_marker(folder, replace(marker, boot_id=boot_id(), modified_ns=times))
        return Inspected(marker.manifest, right, fault)

    def is_ready(self, name: str, revision: str) -> bool:
        try:
            self.check(name, revision)
        except IncompleteModelError:
            return False
        return True

    def condemn(self, name: str, revision: str) -> None:
        """Nobody is to take this copy for complete any more; its files stay for the repair."""
        with suppress(OSError):
            (self.path(name, revision) / READY).unlink()

    def has(self, manifest: Manifest) -> bool:
        """Whether there is a complete copy with at least the files of `manifest`."""
        try:
            found = self.check(manifest.name, manifest.revision)
        except IncompleteModelError:
            return False
        return {file.path for file in manifest.files} <= {file.path for file in found.files}

    def touch(self, name: str, revision: str) -> None:
        """Note that the copy is used now."""
        with suppress(OSError):
            os.utime(self.path(name, revision) / READY)

    def stage(self, manifest: Manifest) -> Staging:
        """A folder to fill, beside the model's place; what is left of an earlier try or a broken copy is in it."""
        staging = Staging.open(self.path(manifest.name, manifest.revision))
        staging.salvage(self.path(manifest.name, manifest.revision), manifest.files)
        return staging

    def publish(self, staging: Staging, manifest: Manifest) -> Path:
        """Make the files in `staging` the copy of that revision; what is there and broken makes way.

        Files that are not in the manifest are left behind. Returns the published folder, which is another writer's if
        it was faster.
        """
        staged = staging.folder
        target = self.path(manifest.name, manifest.revision)
        _flush(staged, manifest)
        write_marker(staged, Marker(manifest, boot_id(), modification_times(staged, manifest.files)))
        staging.remove_all_but({READY, *(file.path for file in manifest.files)})
        while not (_renamed(staged, target) or self.has(manifest)):
            _set_aside(target)
        _flush_folder(target.parent)
        staging.discard()
        return target

    def sweep(self) -> None:
        """Remove what writers that have gone left behind, except what was written to within a day."""
        for left in [*self.root.glob(f"*/{STAGED}"), *self.root.glob("*/.*.trash")]:
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _KEPT_S and (left.suffix == ".trash" or is_abandoned(left)):
                    _set_aside(left)
        for marker in self.root.glob(f"*/*/{READY}.*.new"):
            with suppress(OSError):
                if time.time() - marker.stat().st_mtime > _KEPT_S:
                    marker.unlink()

    def copies(self) -> list[Copy]:
        """All ready copies below the root, the one used longest ago first."""
        return sorted(self._copies(), key=lambda copy: copy.used_at)

    def _copies(self) -> Iterator[Copy]:
        for ready in self.root.glob(f"*/*/{READY}"):
            name, revision = ready.parent.parent.name, ready.parent.name
            if not revision.startswith("."):
                with suppress(IncompleteModelError, FileNotFoundError):
                    manifest = self.marker(name, revision).manifest
                    yield Copy(name, revision, manifest.total_bytes, ready.stat().st_mtime)

    def staged_bytes(self) -> int:
        """Bytes in folders that are being filled."""
        files = (path for folder in self.root.glob(f"*/{STAGED}") for path in folder.rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())

    def remove(self, name: str, revision: str) -> None:
        _set_aside(self.path(name, revision))
        with suppress(OSError):  # not empty: other revisions of the model
            (self.root / name).rmdir()


def modification_times(folder: Path, files: Sequence[ModelFile]) -> dict[str, int]:
    return {file.path: (folder / file.path).stat().st_mtime_ns for file in files}


def _renamed(staged: Path, target: Path) -> bool:
    """Whether `staged` could be made `target`; it cannot where there is a folder with anything in it."""
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _set_aside(target: Path) -> None:
    """Take a copy away by a rename, so that no reader sees it shrink; processes that have it open keep it."""
    trash = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=".trash", dir=target.parent))
    with suppress(FileNotFoundError):
        os.rename(target, trash / target.name)
    shutil.rmtree(trash, ignore_errors=True)


def write_marker(folder: Path, marker: Marker) -> None:
    """Every call writes a file of its own first: processes that check a copy at the same time all write its marker."""
    temporary = folder / f"{READY}.{uuid.uuid4().hex}.new"
    try:
        temporary.write_text(marker.to_json(), "utf-8")
        _flush_file(temporary)
        os.replace(temporary, folder / READY)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(folder)


def _flush(folder: Path, manifest: Manifest) -> None:
    """Bring files and folders to the disk, so that a marker which survives a power cut tells the truth."""
    paths = [folder / file.path for file in manifest.files]
    for path in paths:
        _flush_file(path)
    for parent in {path.parent for path in paths}:
        _flush_folder(parent)


def _flush_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

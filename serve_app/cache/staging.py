"""A folder being filled with a model's files, before it is published."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from serve_app.cache.disk import ProcessMark
from serve_app.cache.manifest import Found, ModelFile, found_again, has_size
from serve_app.errors import IncompleteModelError

STAGED = ".*.partial"
"""Pattern of the names of such folders."""

_WRITER = ".writer"
_NOBODY = "nobody"
_HEARTBEAT_S = 10.0
_SILENCE_S = 120.0
"""After so long without a heartbeat a writer of another container counts as gone."""
_FIRST_BEAT_S = 10.0
"""For so long a folder may be without the name of its writer."""


class Staging:
    """One writer's folder. It holds only files that belong to the model, each whole and checked, or being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ended = threading.Event()
        (folder / _WRITER).write_text(str(ProcessMark.mine()), "ascii")
        threading.Thread(target=self._beat, name="staging-heartbeat", daemon=True).start()

    @classmethod
    def open(cls, target: Path) -> Staging:
        """A folder beside `target`: one that a dead writer left, else a new one."""
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name[:64]}."
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
        for left in target.parent.glob(f"{prefix}*.partial"):
            if left != folder and is_abandoned(left):
                with suppress(OSError):  # another writer has just taken it
                    os.rename(left, folder)
                    break
        for path in folder.rglob("*"):
            if path.is_symlink():  # no writer makes one, and it could lead out of the folder
                path.unlink()
        return cls(folder)

    def salvage(self, broken: Path, files: Sequence[ModelFile]) -> None:
        """Take over files of a broken copy (as links, so that they cost no space); contents are checked by `held`."""
        for file in files:
            old, new = broken / file.path, self.folder / file.path
            if has_size(broken, file) and not new.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):
                    os.link(old, new)

    def held(self, files: Sequence[ModelFile], known: Mapping[str, Found]) -> dict[int, ModelFile]:
        """Index → file with its hash, of those that are here and right; those that are here and wrong are removed.

        What is `known` of files is that they were read and right, so they are not read again.
        """
        found = {}
        for index, file in enumerate(files):
            path = self.folder / file.path
            if path.exists():
                try:
                    found[index] = found_again(self.folder, file, known.get(file.path))
                except IncompleteModelError:
                    path.unlink()
        return found

    def prepare(self, file: ModelFile) -> Path:
        """An empty file of the right size to write pieces into; its space is reserved on the disk."""
        path = self.folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("wb") as stream:
            if sys.platform == "linux" and file.size:
                os.posix_fallocate(stream.fileno(), 0, file.size)
            else:
                stream.truncate(file.size)
        return path

    def bytes_on_disk(self) -> int:
        """Bytes of everything in the folder, unfinished downloads included."""
        sizes = []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):
                sizes.append(path.stat().st_size if path.is_file() else 0)
        return sum(sizes)

    def remove_all_but(self, wanted: set[str]) -> None:
        """Remove what does not belong to the model, such as a downloader's own records."""
        keep = {self.folder / path for path in wanted}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty: it holds wanted files
                    path.rmdir()
            elif path not in keep:
                path.unlink()

    def leave(self) -> None:
        """Stop writing, and let the next writer go on with what is here."""
        self._ended.set()
        with suppress(OSError):
            (self.folder / _WRITER).write_text(_NOBODY, "ascii")

    def discard(self) -> None:
        self._ended.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self.folder / _WRITER)


def is_abandoned(folder: Path) -> bool:
    """Whether the writer of that folder has gone."""
    try:
        mark = (folder / _WRITER).read_text("ascii")
    except FileNotFoundError:
        return _is_silent(folder, _FIRST_BEAT_S)
    if mark == _NOBODY:
        return True
    alive = None
    with suppress(ValueError):  # written by another release, or not yet written to its end
        alive = ProcessMark.parse(mark).is_alive()
    return _is_silent(folder / _WRITER, _SILENCE_S) if alive is None else not alive


def _is_silent(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:
        return False  # published, discarded or taken over meanwhile

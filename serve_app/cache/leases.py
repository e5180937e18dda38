"""Who uses which revision on this node, so that none in use is removed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from serve_app.cache.disk import ProcessMark

_FOREIGN_S = 24 * 3600.0
"""For how long a lease of another container on the same disk counts, as its process cannot be looked at."""


class Leases:
    """One empty file per process and revision; a lease ends with its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, name: str, revision: str, process: ProcessMark) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{name}@{revision}@{process}").touch()

    def in_use(self) -> set[tuple[str, str]]:
        """(name, revision) of all that a living process uses; leases of dead ones are removed."""
        used = set()
        for path in self._files():
            try:
                name, revision, mark = path.name.split("@", 2)
                process = ProcessMark.parse(mark)
            except ValueError:
                continue
            if self._counts(path, process):
                used.add((name, revision))
            else:
                path.unlink(missing_ok=True)
        return used

    def _files(self) -> Iterator[Path]:
        return self._folder.iterdir() if self._folder.is_dir() else iter(())

    def _counts(self, path: Path, process: ProcessMark) -> bool:
        alive = process.is_alive()
        if alive is not None:
            return alive
        try:
            return time.time() - path.stat().st_mtime < _FOREIGN_S
        except FileNotFoundError:
            return False

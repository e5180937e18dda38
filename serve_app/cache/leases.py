"""Who uses which revision on this node, so that none in use is removed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from serve_app.cache.disk import ProcessMark

_BEAT_S = 60.0
"""Pause between two times at which a process renews its leases."""

_SILENT_S = 15 * 60.0
"""A lease that has not been renewed for so long has ended, where its process cannot be looked at."""


class Leases:
    """One empty file per process and revision; a lease ends with its process.

    Processes of other containers that share the folder cannot be looked at: their leases end when they are not renewed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, name: str, revision: str, process: ProcessMark) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{name}@{revision}@{process}").touch()

    def renew(self, process: ProcessMark) -> None:
        """Show that `process` lives to those who cannot see it."""
        for path in self._files():
            if path.name.endswith(f"@{process}"):
                with suppress(FileNotFoundError):
                    os.utime(path)

    def in_use(self) -> set[tuple[str, str]]:
        """(name, revision) of all that a living process uses; leases of dead ones are removed."""
        used = set()
        for path in self._files():
            if self._counts(path):
                name, revision, *_ = path.name.split("@")
                used.add((name, revision))
            else:
                path.unlink(missing_ok=True)
        return used

    def _files(self) -> Iterator[Path]:
        return self._folder.glob("*@*@*")

    def _counts(self, path: Path) -> bool:
        alive = None
        with suppress(ValueError):  # written by another release
            alive = ProcessMark.parse(path.name.split("@", 2)[2]).is_alive()
        if alive is not None:
            return alive
        try:
            return time.time() - path.stat().st_mtime < _SILENT_S
        except FileNotFoundError:
            return False


def leases_below(root: Path) -> Path:
    """The folder of the leases in a cache."""
    return root / ".leases"


def leases_beside(copy: Path) -> Path:
    """The same, from the folder `<root>/<name>/<revision>` of a copy."""
    return leases_below(copy.parents[1])


def keep_renewing(folder: Path, process: ProcessMark, pause_s: float = _BEAT_S) -> None:
    """Renew the leases of this process, which is `process`, as long as it lives: for a process that loads models."""
    with _lock:
        if folder in _renewed:
            return
        _renewed.add(folder)
    arguments = Leases(folder), process, pause_s
    threading.Thread(target=_renew_for_ever, args=arguments, name="lease-heartbeat", daemon=True).start()


_renewed: set[Path] = set()
_lock = threading.Lock()


def _renew_for_ever(leases: Leases, process: ProcessMark, pause_s: float) -> None:
    while True:
        time.sleep(pause_s)
        with suppress(OSError):  # a full or absent disk is no reason to end; the next beat tries again
            leases.renew(process)

"""Paths that a model's files or its source name: they must not lead out of the model's folder."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

from serve_app.errors import IncompleteModelError

_DRIVE = re.compile("[A-Za-z]:")


def check_relative(path: str) -> None:
    """Raises IncompleteModelError unless `path` names something below a folder.

    It must not lead elsewhere on Windows either, from where it may come.
    """
    windows = PureWindowsPath(path)  # knows / as well
    if not windows.parts or windows.root or _DRIVE.match(path) or ".." in windows.parts or "\0" in path:
        raise IncompleteModelError(
            f"{path[:300]!r} is no path of a file below a model's folder: it must be relative, with / between its "
            "parts, and without .. among them"
        )


def below(folder: Path, path: str) -> Path:
    """`path` in `folder`. Raises IncompleteModelError if it, or a link on the way, leads out of the folder."""
    check_relative(path)
    full = folder / path
    if not full.resolve().is_relative_to(folder.resolve()):
        raise IncompleteModelError(f"{folder}: a link leads from {path} out of the folder; remove it")
    return full

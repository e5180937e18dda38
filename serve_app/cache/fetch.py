"""Putting files of a model into a folder: from a package or directory of this node, or from the Hub."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from serve_app.cache.hub import Hub
from serve_app.cache.manifest import Manifest, ModelFile
from serve_app.cache.resolve import source_folder
from serve_app.config import source_kind
from serve_app.errors import SourceNotFoundError


def fetch(manifest: Manifest, files: Sequence[ModelFile], into: Path, hub: Hub) -> None:
    """Put `files` below `into`, unverified; each appears at its place when it is whole.

    Raises SourceNotFoundError, SourceAccessError, SourceUnavailableError or DiskFullError.
    """
    if source_kind(manifest.source) == "hub":
        hub.download(manifest.source, manifest.revision, files, into)
        return
    source = source_folder(manifest.source)
    for file in files:
        _copy(source / file.path, into / file.path)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex}.copying")
    try:
        shutil.copyfile(source, partial)
        partial.rename(target)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{source} is no longer there") from error
    finally:
        partial.unlink(missing_ok=True)

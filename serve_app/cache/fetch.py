"""Putting a model's files into a folder: from a package or directory of this node, or from the Hub."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

from serve_app.cache.hub import Hub
from serve_app.cache.manifest import Manifest, check_contents, check_shards
from serve_app.cache.resolve import Resolved
from serve_app.errors import DiskFullError


def fetch(resolved: Resolved, into: Path, hub: Hub) -> Manifest:
    """Fill `into` and check every file; the manifest with all hashes known.

    Raises any CacheError: the source's, DiskFullError, or IncompleteModelError if what arrived is not what was pinned.
    """
    manifest = resolved.manifest
    if resolved.folder is None:
        hub.download(manifest.source, manifest.revision, manifest.files, into)
    else:
        _copy(manifest, resolved.folder, into)
    files = check_contents(into, manifest.files)
    check_shards(into, files)
    return replace(manifest, files=files)


def _copy(manifest: Manifest, source: Path, into: Path) -> None:
    for file in manifest.files:
        target = into / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source / file.path, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    f"{manifest.name}: the disk of {into} ran full; the model needs {manifest.total_bytes} bytes"
                ) from error
            raise

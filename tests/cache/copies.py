"""Models made by hand for tests of the cache's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from serve_app.cache.manifest import Manifest, ModelFile
from serve_app.cache.store import Store

CONTENT: Mapping[str, bytes] = {"config.json": b"{}", "sub/weights.safetensors": b"weights"}


def manifest_of(content: Mapping[str, bytes] = CONTENT, name: str = "m", revision: str = "r") -> Manifest:
    files = (ModelFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in content.items())
    return Manifest(name, "x/y", revision, "rule", tuple(files))


def write_files(folder: Path, content: Mapping[str, bytes] = CONTENT) -> None:
    """New files, as all real writers make them: what lies in the folder may be a link to a published copy's file."""
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        (folder / path).write_bytes(data)


def publish(store: Store, content: Mapping[str, bytes] = CONTENT, name: str = "m", revision: str = "r") -> Path:
    manifest = manifest_of(content, name, revision)
    staging = store.stage(manifest)
    write_files(staging.folder, content)
    (staging.folder / "downloader.lock").write_text("")
    return store.publish(staging, manifest)

"""What a complete copy of a model consists of, and how a copy is checked against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from serve_app.errors import IncompleteModelError

READY = ".ready"
"""The marker: the manifest as JSON. Written after every file, so that where it is, all is."""

_FORMAT = 1
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file; `path` is relative, with `/`. Hashes are None where the source does not know them."""

    path: str
    size: int
    sha256: str | None = None
    git_blob: str | None = None
    """SHA-1 of the file as a git blob: what the Hub knows of files that are not in LFS."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One model, pinned: `revision` is the folder's name in the cache."""

    name: str
    source: str
    revision: str
    files: tuple[ModelFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError if `text` is no manifest of this format."""
        try:
            raw = json.loads(text)
            if raw.pop("format") != _FORMAT:
                raise ValueError("another format")
            files = tuple(ModelFile(**file) for file in raw.pop("files"))
            return cls(files=files, **raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def check_sizes(folder: Path, files: Sequence[ModelFile]) -> None:
    """Raises IncompleteModelError that names the first file which is missing or has another size."""
    for file in files:
        try:
            size = (folder / file.path).stat().st_size
        except FileNotFoundError:
            raise IncompleteModelError(f"{folder}: {file.path} is missing") from None
        if size != file.size:
            raise IncompleteModelError(f"{folder}: {file.path} has {size} bytes instead of {file.size}")


def check_contents(folder: Path, files: Sequence[ModelFile]) -> tuple[ModelFile, ...]:
    """Read every file; the same files with `sha256` filled in.

    Raises IncompleteModelError that names the first file which is missing or differs.
    """
    check_sizes(folder, files)
    return tuple(_check_content(folder, file) for file in files)


def _check_content(folder: Path, file: ModelFile) -> ModelFile:
    sha256, git_blob = hash_file(folder / file.path, with_git=file.sha256 is None and file.git_blob is not None)
    if (file.sha256 or sha256) != sha256 or (git_blob is not None and git_blob != file.git_blob):
        raise IncompleteModelError(f"{folder}: {file.path} is altered: its hash is not the one of {file.path} pinned")
    return replace(file, sha256=sha256)


def hash_file(path: Path, *, with_git: bool = False) -> tuple[str, str | None]:
    """(sha256, git blob hash or None), both hexadecimal."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if with_git else None
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            if git is not None:
                git.update(chunk)
    return sha256.hexdigest(), git.hexdigest() if git is not None else None


def content_hash(files: Sequence[ModelFile]) -> str:
    """12 hexadecimal digits that change with any file's name or content (all `sha256` are known)."""
    lines = sorted(f"{file.path}\0{file.size}\0{file.sha256}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def check_shards(folder: Path, files: Sequence[ModelFile]) -> None:
    """Raises IncompleteModelError if an index of the weights names a shard that is not among `files`."""
    present = {file.path for file in files}
    for file in files:
        if file.path.endswith(".safetensors.index.json"):
            parent = file.path.rpartition("/")[0]
            index = json.loads((folder / file.path).read_text("utf-8"))
            for shard in sorted(set(index["weight_map"].values())):
                if (f"{parent}/{shard}" if parent else shard) not in present:
                    raise IncompleteModelError(f"{folder}: {file.path} names {shard}, which is missing")

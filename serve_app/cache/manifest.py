"""What a complete copy of a model consists of, and how a copy is checked against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from serve_app.errors import IncompleteModelError

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
    """One model, pinned: `revision` is the folder's name in the cache, `selection` by what rule `files` were chosen."""

    name: str
    source: str
    revision: str
    selection: str
    files: tuple[ModelFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of `.ready`: what lies beside it, and what was true when it was last read in full."""

    manifest: Manifest
    boot_id: str
    modified_ns: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Marker:
        """Raises ValueError if `text` is no marker of this format."""
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw.pop("format") != _FORMAT:
                raise ValueError("another format")
            manifest = raw.pop("manifest")
            files = tuple(ModelFile(**file) for file in manifest.pop("files"))
            return cls(manifest=Manifest(files=files, **manifest), **raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a marker: {error}") from error


def check_size(folder: Path, file: ModelFile) -> None:
    """Raises IncompleteModelError if the file is missing or has another size."""
    try:
        size = (folder / file.path).stat().st_size
    except FileNotFoundError:
        raise IncompleteModelError(f"{folder}: {file.path} is missing") from None
    if size != file.size:
        raise IncompleteModelError(f"{folder}: {file.path} has {size} bytes instead of {file.size}")


def has_size(folder: Path, file: ModelFile) -> bool:
    """Whether the file is there with the right size."""
    try:
        check_size(folder, file)
    except IncompleteModelError:
        return False
    return True


def check_content(folder: Path, file: ModelFile) -> ModelFile:
    """Read the file; `file` with `sha256` filled in. Raises IncompleteModelError if it is missing or differs."""
    check_size(folder, file)
    sha256, git_blob = hash_file(folder / file.path, with_git=file.sha256 is None and file.git_blob is not None)
    if (file.sha256 or sha256) != sha256 or (git_blob is not None and git_blob != file.git_blob):
        raise IncompleteModelError(f"{folder}: {file.path} is altered: its content is not what was pinned")
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
        if file.path.endswith(".index.json"):
            parent = file.path.rpartition("/")[0]
            index = json.loads((folder / file.path).read_text("utf-8"))
            for shard in sorted(set(index.get("weight_map", {}).values())):
                if (f"{parent}/{shard}" if parent else shard) not in present:
                    raise IncompleteModelError(f"{folder}: {file.path} names {shard}, which is missing")

"""What a complete copy of a model consists of, and how a copy is checked against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from serve_app.errors import IncompleteModelError
from serve_app.paths import below, check_relative

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

    def __post_init__(self) -> None:
        """Raises IncompleteModelError if `path` leads anywhere but to a file below a folder."""
        check_relative(self.path)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One model, pinned: `revision` is the folder's name in the cache, `selection` by what rule `files` were chosen."""

    name: str
    source: str
    revision: str
    selection: str
    files: tuple[ModelFile, ...]

    def __post_init__(self) -> None:
        """Raises IncompleteModelError if `name` or `revision` cannot be a folder's name."""
        for folder in (self.name, self.revision):
            check_relative(folder)
            if "/" in folder or folder.startswith("."):
                raise IncompleteModelError(f"{folder[:300]!r} is no name of a folder in the cache")

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
        except (TypeError, KeyError, AttributeError, IncompleteModelError) as error:
            raise ValueError(f"not a marker: {error}") from error


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was read and is right, as long as it still has its modification time."""

    file: ModelFile
    modified_ns: int


def check_size(folder: Path, file: ModelFile) -> None:
    """Raises IncompleteModelError if the file is missing, has another size, or lies elsewhere and is only linked to."""
    try:
        size = below(folder, file.path).stat().st_size
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


def found_again(folder: Path, file: ModelFile, known: Found | None) -> ModelFile:
    """As `check_content`, but a file that is still as it is `known` is not read."""
    if known is not None and _is_same(file, known.file):
        check_size(folder, file)
        if (folder / file.path).stat().st_mtime_ns == known.modified_ns:
            return replace(file, sha256=known.file.sha256)
    return check_content(folder, file)


def _is_same(file: ModelFile, known: ModelFile) -> bool:
    """Whether `known`, whose `sha256` is known, has the content that `file` is pinned to."""
    if file.sha256 is not None:
        return file.sha256 == known.sha256
    return file.git_blob is not None and file.git_blob == known.git_blob


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


def check_shards(folder: Path, paths: Collection[str]) -> None:
    """Raises IncompleteModelError if an index of the weights names a shard that is not among `paths`.

    So none is outside of the folder either, wherever the index leads.
    """
    for path in paths:
        if path.endswith(".index.json"):
            parent = path.rpartition("/")[0]
            for shard in _shards(folder / path):
                if (f"{parent}/{shard}" if parent else shard) not in paths:
                    raise IncompleteModelError(f"{folder}: {path} names {shard[:300]}, which is missing")


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names. Raises IncompleteModelError if it is none."""
    try:
        shards = set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
        return sorted(map(_text, shards))
    except (ValueError, AttributeError, TypeError) as error:
        raise IncompleteModelError(f"{index}: this is no index of weights: {error}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no file name")
    return value

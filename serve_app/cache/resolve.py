"""From a model's source to a pinned list of files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from serve_app.cache.hub import Hub
from serve_app.cache.manifest import Manifest, ModelFile, content_hash, hash_file
from serve_app.cache.selection import needed_files
from serve_app.cache.store import expand
from serve_app.config import ModelConfig, source_kind
from serve_app.errors import IncompleteModelError, SourceNotFoundError

_RULE = 1
"""Raise it when `selection` takes other files than before: copies made by the old rule are then completed."""


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_MOST_POINTER_BYTES = 1024
"""By the specification of Git LFS pointers are shorter."""


def selection_of(model: ModelConfig) -> str:
    """By what rule the files of `model` are chosen; two configurations with the same rule need the same files."""
    return json.dumps([_RULE, model.files, model.allow_pickle])


def resolve(model: ModelConfig, hub: Hub) -> Manifest:
    """List what `model` needs. Reads metadata of the Hub, and every byte of a package or directory.

    Raises SourceNotFoundError, SourceAccessError, SourceUnavailableError, or IncompleteModelError.
    """
    kind = source_kind(model.source)
    if kind == "hub":
        return _resolve_hub(model, hub)
    folder = source_folder(model.source)
    files = tuple(_pin(folder, path) for path in files_in(folder, model))
    version = _package_version(model.source) if kind == "package" else "0"
    return Manifest(model.name, model.source, f"{version}-{content_hash(files)}", selection_of(model), files)


def files_in(folder: Path, model: ModelConfig) -> list[str]:
    """The files of `folder` that `model` needs, with `/`. Raises IncompleteModelError, also if one has no content."""
    there = (path for path in folder.rglob("*") if path.is_file() or (path.is_symlink() and not path.exists()))
    files = _needed(model, sorted(path.relative_to(folder).as_posix() for path in there))
    for path in files:
        _check_has_content(folder, path)
    return files


def _check_has_content(folder: Path, path: str) -> None:
    """Raises IncompleteModelError where a link or a note of Git LFS stands in the place of the file."""
    full = folder / path
    if not full.exists():
        raise IncompleteModelError(
            f"{folder}: {path} is a link to {full.readlink()}, which is not there. Copy the files themselves "
            "(cp -rL, rsync -L), or mount what the link leads to at the same place"
        )
    if full.stat().st_size <= _MOST_POINTER_BYTES and full.read_bytes().startswith(_LFS_POINTER):
        raise IncompleteModelError(
            f"{folder}: {path} is a pointer of Git LFS, not the file itself; fetch the files (git lfs install && git "
            "lfs pull), or download the model with `hf download`"
        )


def _resolve_hub(model: ModelConfig, hub: Hub) -> Manifest:
    assert model.revision is not None, "the configuration requires a revision for the Hub"
    listed = {file.path: file for file in hub.list_files(model.source, model.revision)}
    files = tuple(listed[path] for path in _needed(model, sorted(listed)))
    return Manifest(model.name, model.source, model.revision, selection_of(model), files)


def _needed(model: ModelConfig, listed: Sequence[str]) -> list[str]:
    return needed_files(listed, model.source, model.files, allow_pickle=model.allow_pickle)


def source_folder(source: str) -> Path:
    """The folder of a `package:` or directory source on this node. Raises SourceNotFoundError."""
    if source_kind(source) == "package":
        module, _, inner = source.removeprefix("package:").partition("/")
        folder = _module_folder(module, source) / inner
    else:
        folder = expand(source)
    if not folder.is_dir():
        raise SourceNotFoundError(f"{source}: there is no folder {folder} on this node")
    return folder


def _module_folder(module: str, source: str) -> Path:
    """Found without importing it: only the top package is looked up, what follows is taken as folders."""
    top, *below = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise SourceNotFoundError(
            f"{source}: no Python package {top!r} is installed on this node; install it in the image of every node"
        )
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*below)


def _pin(folder: Path, path: str) -> ModelFile:
    full = folder / path
    return ModelFile(path, full.stat().st_size, hash_file(full)[0])


def _package_version(source: str) -> str:
    top = source.removeprefix("package:").partition("/")[0].partition(".")[0]
    distributions = importlib.metadata.packages_distributions().get(top, ())
    return importlib.metadata.version(distributions[0]) if distributions else "0"

"""One node's folder of models: `<root>/<model name>/<revision>/`, each complete or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve_app.cache.manifest import READY, Manifest, check_sizes
from serve_app.errors import IncompleteModelError


def expand(path: str) -> Path:
    """`~` and `$VARIABLES` of this node put in. Raises IncompleteModelError if a variable is not set here."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise IncompleteModelError(f"{path}: a variable in it is not set on this node")
    return Path(expanded).absolute()


def model_path(root: Path, name: str, revision: str) -> Path:
    """Where that revision of that model lies on a node, once it is ready."""
    return root / name / revision


class Store:
    """Reads and publishes models below one root. Any number of processes may use one root at the same time.

    A writer fills a folder of its own and publishes it by one rename: of two that race, the second finds the first's
    complete copy and throws its own away. No lock is held, so none can be left behind or be without effect on a
    network filesystem.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, revision: str) -> Path:
        return model_path(self.root, name, revision)

    def manifest(self, name: str, revision: str) -> Manifest:
        """The manifest of a ready copy whose files all have their size.

        Raises IncompleteModelError, saying what is wrong, if there is no such copy.
        """
        folder = self.path(name, revision)
        try:
            manifest = Manifest.from_json((folder / READY).read_text("utf-8"))
        except FileNotFoundError:
            raise IncompleteModelError(f"{folder}: no {READY} marker") from None
        except ValueError as error:
            raise IncompleteModelError(f"{folder}: the {READY} marker cannot be read: {error}") from error
        check_sizes(folder, manifest.files)
        return manifest

    def is_ready(self, name: str, revision: str) -> bool:
        try:
            self.manifest(name, revision)
        except IncompleteModelError:
            return False
        return True

    @contextmanager
    def staging(self, name: str, revision: str) -> Iterator[Path]:
        """A new empty folder beside the model's place, on the same filesystem; removed at the end."""
        parent = self.path(name, revision).parent
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{revision[:64]}.", suffix=".partial", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, staged: Path, manifest: Manifest) -> Path:
        """Make the files in `staged` the copy of that revision; what is there and broken makes way.

        Files that are not in the manifest are left behind. Returns the published folder, which is another writer's if
        it was faster.
        """
        _only(staged, manifest)
        _flush(staged)
        _write_marker(staged, manifest)
        target = self.path(manifest.name, manifest.revision)
        while not (_renamed(staged, target) or self.is_ready(manifest.name, manifest.revision)):
            self._set_aside(target)
        _flush_folder(target.parent)
        return target

    def _set_aside(self, target: Path) -> None:
        """Take a broken copy away by a rename, so that no reader sees it shrink."""
        trash = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=".trash", dir=target.parent))
        with suppress(FileNotFoundError):
            os.rename(target, trash / target.name)
        shutil.rmtree(trash, ignore_errors=True)


def _renamed(staged: Path, target: Path) -> bool:
    """Whether `staged` could be made `target`; it cannot where there is a folder with anything in it."""
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _only(folder: Path, manifest: Manifest) -> None:
    """Remove what is not in the manifest, such as a downloader's own records."""
    wanted = {folder / file.path for file in manifest.files}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty: it holds wanted files
                path.rmdir()
        elif path not in wanted:
            path.unlink()


def _write_marker(folder: Path, manifest: Manifest) -> None:
    temporary = folder / f"{READY}.new"
    temporary.write_text(manifest.to_json(), "utf-8")
    _flush_file(temporary)
    os.replace(temporary, folder / READY)
    _flush_folder(folder)


def _flush(folder: Path) -> None:
    """Bring files and folders to the disk, so that a marker which survives a power cut tells the truth."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            _flush_file(path)


def _flush_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

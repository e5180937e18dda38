from __future__ import annotations

import threading
from pathlib import Path

import pytest

from serve_app.cache.manifest import READY, Manifest, ModelFile, hash_file
from serve_app.cache.store import Store, expand
from serve_app.errors import IncompleteModelError

CONTENT = b"weights"


def publish(store: Store, content: bytes = CONTENT) -> Path:
    with store.staging("m", "r") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(content)
        (folder / "downloader.lock").write_text("")
        files = (ModelFile("sub/a", len(content), hash_file(folder / "sub" / "a")[0]),)
        return store.publish(folder, Manifest("m", "x/y", "r", files))


def leftovers(store: Store) -> list[str]:
    return [path.name for path in (store.root / "m").iterdir() if path.name != "r"]


def test_published_folder_holds_the_files_of_the_manifest_and_the_marker_only(tmp_path: Path) -> None:
    path = publish(Store(tmp_path))
    assert path == tmp_path / "m" / "r"
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == [READY, "sub", "sub/a"]
    assert leftovers(Store(tmp_path)) == []


def test_nothing_is_ready_before_it_is_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.staging("m", "r") as folder:
        (folder / "a").write_bytes(CONTENT)
        assert not store.is_ready("m", "r")
    assert leftovers(store) == []


@pytest.mark.parametrize("harm", ["truncate", "remove", "marker", "garble"])
def test_a_harmed_copy_is_not_ready_and_publishing_again_replaces_it(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    path = publish(store)
    match harm:
        case "truncate":
            (path / "sub" / "a").write_bytes(CONTENT[:-1])
        case "remove":
            (path / "sub" / "a").unlink()
        case "marker":
            (path / READY).unlink()
        case "garble":
            (path / READY).write_text("{")
    assert not store.is_ready("m", "r")
    publish(store)
    assert store.is_ready("m", "r")
    assert leftovers(store) == []


def test_of_racing_writers_each_finds_one_complete_copy(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    paths: list[Path] = []

    def write() -> None:
        store = Store(tmp_path)
        start.wait()
        paths.append(publish(store))
        assert store.is_ready("m", "r")

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [tmp_path / "m" / "r"] * 8
    assert (tmp_path / "m" / "r" / "sub" / "a").read_bytes() == CONTENT
    assert leftovers(Store(tmp_path)) == []


def test_root_is_expanded_with_this_nodes_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVME", "/disk/0")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("$NVME/models") == Path("/disk/0/models")
    assert expand("~/models") == Path("/home/me/models")
    with pytest.raises(IncompleteModelError, match="not set on this node"):
        expand("$NO_SUCH_VARIABLE/models")

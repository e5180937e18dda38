from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import serve_app.cache.store as store_module
from serve_app.cache.staging import Staging, is_abandoned
from serve_app.cache.store import READY, Store, expand
from serve_app.errors import IncompleteModelError
from tests.cache.copies import CONTENT, manifest_of, publish, write_files

WEIGHTS = "sub/weights.safetensors"


def beside(store: Store) -> list[str]:
    return [path.name for path in (store.root / "m").iterdir() if path.name != "r"]


def test_published_folder_holds_the_files_of_the_manifest_and_the_marker_only(tmp_path: Path) -> None:
    path = publish(Store(tmp_path))
    assert path == tmp_path / "m" / "r"
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == [READY, "config.json", "sub", WEIGHTS]
    assert beside(Store(tmp_path)) == []


def test_nothing_is_ready_before_it_is_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    staging = store.stage(manifest_of())
    write_files(staging.folder)
    assert not store.is_ready("m", "r")
    staging.discard()
    assert beside(store) == []


@pytest.mark.parametrize("harm", ["truncate", "remove", "marker", "garble"])
def test_a_harmed_copy_is_not_ready_and_publishing_again_replaces_it(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    path = publish(store)
    match harm:
        case "truncate":
            (path / WEIGHTS).write_bytes(CONTENT[WEIGHTS][:-1])
        case "remove":
            (path / WEIGHTS).unlink()
        case "marker":
            (path / READY).unlink()
        case "garble":
            (path / READY).write_text("{")
    assert not store.is_ready("m", "r")
    publish(store)
    assert store.is_ready("m", "r")
    assert beside(store) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_found_by_the_files_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    flip(publish(store) / WEIGHTS)
    with pytest.raises(IncompleteModelError, match="altered"):
        store.check("m", "r")


def test_a_byte_that_flipped_unseen_is_found_by_the_full_check_and_after_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    path = publish(store) / WEIGHTS
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    store.check("m", "r")
    with pytest.raises(IncompleteModelError, match="altered"):
        store.check("m", "r", in_full=True)
    monkeypatch.setattr(store_module, "boot_id", lambda: "another boot")
    with pytest.raises(IncompleteModelError, match="altered"):
        store.check("m", "r")


def test_a_file_that_was_only_touched_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    os.utime(publish(store) / WEIGHTS)
    store.check("m", "r")
    monkeypatch.setattr(store_module, "check_content", None)
    store.check("m", "r")


def test_of_racing_writers_each_finds_one_complete_copy(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    paths: list[Path] = []
    ready: list[bool] = []

    def write() -> None:
        store = Store(tmp_path)
        start.wait()
        paths.append(publish(store))
        ready.append(store.is_ready("m", "r"))

    threads = [threading.Thread(daemon=True, target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [tmp_path / "m" / "r"] * 8
    assert all(ready)
    assert (tmp_path / "m" / "r" / WEIGHTS).read_bytes() == CONTENT[WEIGHTS]
    assert beside(Store(tmp_path)) == []


def test_files_of_a_broken_copy_that_are_right_are_taken_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = publish(store)
    flip(path / WEIGHTS)
    staging = store.stage(manifest_of())
    assert list(staging.held(manifest_of().files, {})) == [0]
    assert not (staging.folder / WEIGHTS).exists()
    staging.discard()


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from serve_app.cache.staging import Staging;"
        "staging = Staging.open(Path(sys.argv[1])); (staging.folder / 'config.json').write_bytes(b'{}');"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m" / "r")], check=False)
    assert killed.returncode == -9
    store = Store(tmp_path)
    staging = store.stage(manifest_of())
    assert list(staging.held(manifest_of().files, {})) == [0]
    assert beside(store) == [staging.folder.name]
    staging.discard()


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    mine, other = Staging.open(tmp_path / "r"), Staging.open(tmp_path / "r")
    assert mine.folder != other.folder
    mine.leave()
    assert Staging.open(tmp_path / "r").folder.name in {p.name for p in tmp_path.iterdir()}
    assert not mine.folder.exists()


def test_copies_are_listed_by_last_use(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for revision in ("a", "b"):
        os.utime(publish(store, revision=revision) / READY, (100, 100))
    os.utime(tmp_path / "m" / "a" / READY, (50, 50))
    assert [copy.revision for copy in store.copies()] == ["a", "b"]
    store.touch("m", "a")
    assert [copy.revision for copy in store.copies()] == ["b", "a"]
    assert store.copies()[0].bytes == manifest_of().total_bytes


def test_leftovers_are_swept_after_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    left = Staging.open(tmp_path / "m" / "old")
    left.leave()
    store.sweep()
    assert left.folder.exists()
    os.utime(left.folder, (0, 0))
    store.sweep()
    assert beside(store) == []
    assert store.is_ready("m", "r")


def test_root_is_expanded_with_this_nodes_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVME", "/disk/0")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("$NVME/models") == Path("/disk/0/models")
    assert expand("~/models") == Path("/home/me/models")
    with pytest.raises(IncompleteModelError, match="not set on this node"):
        expand("$NO_SUCH_VARIABLE/models")


def test_a_root_in_a_home_that_there_is_not_is_refused_and_no_folder_of_that_name() -> None:
    with pytest.raises(IncompleteModelError, match="there is no such home"):
        expand("~nobody-of-that-name/models")


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_copy_with_a_link_that_leads_out_is_not_ready(tmp_path: Path, place: str) -> None:
    """Whatever the link leads to, even the same bytes: it is not in the cache, and changes without it."""
    store = Store(tmp_path / "cache")
    path = publish(store)
    moved = path / WEIGHTS if place == "file" else (path / WEIGHTS).parent
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IncompleteModelError, match=f"a link leads from {WEIGHTS} out of the folder"):
        store.check("m", "r")
    publish(store)
    assert store.is_ready("m", "r")
    assert (tmp_path / "elsewhere").exists()


def test_a_link_in_a_folder_that_a_writer_left_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights.safetensors").write_bytes(b"somebody's own")
    left = Staging.open(tmp_path / "cache" / "m" / "r")
    (left.folder / "sub").symlink_to(outside)
    left.leave()
    staging = Store(tmp_path / "cache").stage(manifest_of())
    assert staging.held(manifest_of().files, {}) == {}
    staging.prepare(manifest_of().files[1]).write_bytes(CONTENT[WEIGHTS])
    assert (outside / "weights.safetensors").read_bytes() == b"somebody's own"
    staging.discard()


def test_processes_that_write_one_marker_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has written its marker, and none has put it in place, before any goes on."""
    store = Store(tmp_path)
    path = publish(store)
    marker = store.marker("m", "r")
    written = threading.Barrier(4, timeout=30)
    flush = store_module._flush_file

    def meet(file: Path) -> None:
        flush(file)
        written.wait()

    monkeypatch.setattr(store_module, "_flush_file", meet)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            store_module.write_marker(path, marker)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(daemon=True, target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.marker("m", "r") == marker
    assert [file.name for file in path.glob(f"{READY}*")] == [READY]


def test_a_marker_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    store = Store(tmp_path)
    path = publish(store)
    marker = store.marker("m", "r")
    monkeypatch.setattr(store_module, "_flush_file", full)
    with pytest.raises(OSError, match="No space left"):
        store_module.write_marker(path, marker)
    assert [file.name for file in path.glob(f"{READY}*")] == [READY]


def test_markers_that_killed_writers_left_are_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = (publish(store) / f"{READY}.{name}.new" for name in ("old", "new"))
    for marker in (old, new):
        marker.write_text("{")
    os.utime(old, (0, 0))
    store.sweep()
    assert (old.exists(), new.exists()) == (False, True)
    assert store.is_ready("m", "r")


def test_the_writer_of_another_release_is_gone_when_it_is_silent(tmp_path: Path) -> None:
    left = Staging.open(tmp_path / "r")
    writer = left.folder / ".writer"
    writer.write_text("a mark of another kind")
    os.utime(left.folder, (0, 0))
    assert not is_abandoned(left.folder)
    os.utime(writer, (0, 0))
    assert is_abandoned(left.folder)
    left.discard()

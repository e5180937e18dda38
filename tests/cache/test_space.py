from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve_app.cache.leases as leases_module
from serve_app.cache.disk import ProcessMark, free_bytes
from serve_app.cache.leases import Leases, keep_renewing, leases_below, leases_beside
from serve_app.cache.space import make_room
from serve_app.cache.store import READY, Store
from serve_app.config import CacheConfig
from serve_app.errors import DiskFullError
from tests.cache.copies import publish
from tests.cluster.hosts import missing_for_root

KIB = {"config.json": b"{}", "model.safetensors": bytes(1022)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three copies of 1 KiB, `old` used before `mid` and that before `new`."""
    store = Store(tmp_path)
    for age, revision in enumerate(("old", "mid", "new")):
        os.utime(publish(store, KIB, revision=revision) / READY, (1000 + age, 1000 + age))
    return store


def revisions(store: Store) -> list[str]:
    return [copy.revision for copy in store.copies()]


def test_nothing_goes_while_there_is_room(store: Store) -> None:
    make_room(store, CacheConfig(max_bytes=4096, min_free_bytes=0), set(), "model", 1024)
    assert revisions(store) == ["old", "mid", "new"]


def test_copies_used_longest_ago_go_first_and_no_more_than_needed(store: Store) -> None:
    make_room(store, CacheConfig(max_bytes=4096, min_free_bytes=0), set(), "model", 2048)
    assert revisions(store) == ["mid", "new"]


def test_a_copy_in_use_stays(store: Store) -> None:
    make_room(store, CacheConfig(max_bytes=4096, min_free_bytes=0), {("m", "old")}, "model", 2048)
    assert revisions(store) == ["old", "new"]


def test_where_all_is_in_use_the_model_is_refused_and_nothing_goes(store: Store) -> None:
    kept = {("m", "old"), ("m", "new")}
    with pytest.raises(DiskFullError, match=r"model needs 4096 more bytes.*cache\.max_bytes is 4096.*Make space"):
        make_room(store, CacheConfig(max_bytes=4096, min_free_bytes=0), kept, "model", 4096)
    assert revisions(store) == ["old", "mid", "new"]


def test_the_reserve_stays_free(store: Store) -> None:
    free = free_bytes(store.root)
    with pytest.raises(DiskFullError, match=r"must stay free \(cache\.min_free_bytes\)"):
        make_room(store, CacheConfig(min_free_bytes=free), {("m", r) for r in revisions(store)}, "model", 1 << 20)


def test_a_lease_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    leases = Leases(tmp_path / ".leases")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = ProcessMark.mine()
    leases.take("m", "new", ProcessMark(mine.space, child.pid, time.time()))
    leases.take("m", "old", mine)
    assert leases.in_use() == {("m", "new"), ("m", "old")}
    child.communicate(b"")
    assert leases.in_use() == {("m", "old")}
    assert len(list((tmp_path / ".leases").iterdir())) == 1


IN_A_CONTAINER = """
import sys
from pathlib import Path
from serve_app.cache.disk import ProcessMark
from serve_app.cache.leases import Leases
Leases(Path(sys.argv[1])).take("m", "theirs", ProcessMark.mine())
print("taken", flush=True)
input()
"""


def no_namespaces() -> str | None:
    """Why a container's process numbers cannot be tried here; None if they can."""
    missing = missing_for_root("unshare")
    if missing is not None:
        return f"a PID namespace needs {missing}"
    probe = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    return (
        None
        if probe.returncode == 0
        else f"a PID namespace needs `unshare --pid`, which fails here: {probe.stderr.decode().strip()}"
    )


@pytest.fixture(params=["a PID namespace", "another space"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Leases]:
    """Leases with one of a living process whose number means nothing here, though its host name is the same."""
    leases = Leases(tmp_path / ".leases")
    if request.param == "another space":
        leases.take("m", "theirs", ProcessMark("another.4026531836", os.getpid(), 0.0))
        yield leases
        return
    why_not = no_namespaces()
    if why_not is not None:
        pytest.skip(why_not)
    enter = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
    with subprocess.Popen(
        [*enter, "-c", IN_A_CONTAINER, str(tmp_path / ".leases")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"taken\n"
        yield leases
        user.communicate(b"\n")


def age(leases: Leases, seconds: float) -> None:
    for lease in leases._files():
        os.utime(lease, (time.time() - seconds,) * 2)


def test_a_lease_of_another_container_counts_while_it_is_renewed(container: Leases) -> None:
    assert container.in_use() == {("m", "theirs")}
    age(container, leases_module._SILENT_S - 60)
    assert container.in_use() == {("m", "theirs")}


def test_a_lease_of_another_container_ends_when_it_is_not(container: Leases) -> None:
    age(container, leases_module._SILENT_S + 60)
    assert container.in_use() == set()
    assert list(container._files()) == []


def test_a_process_renews_its_own_leases_and_no_others(tmp_path: Path) -> None:
    leases = Leases(tmp_path / ".leases")
    mine = ProcessMark.mine()
    leases.take("m", "mine", mine)
    leases.take("m", "theirs", ProcessMark("another", mine.pid, mine.started))
    age(leases, 10_000)
    keep_renewing(tmp_path / ".leases", mine, pause_s=0.01)
    deadline = time.monotonic() + 30
    while time.time() - (tmp_path / ".leases" / f"m@mine@{mine}").stat().st_mtime > 5_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert leases.in_use() == {("m", "mine")}


def test_a_lease_that_cannot_be_read_ends_too(tmp_path: Path) -> None:
    leases = Leases(tmp_path / ".leases")
    (tmp_path / ".leases").mkdir()
    (tmp_path / ".leases" / "m@r@a mark of another release").touch()
    assert leases.in_use() == {("m", "r")}
    age(leases, leases_module._SILENT_S + 60)
    assert leases.in_use() == set()


def test_a_lease_is_beside_the_copies(tmp_path: Path) -> None:
    assert leases_beside(tmp_path / "m" / "r") == leases_below(tmp_path)

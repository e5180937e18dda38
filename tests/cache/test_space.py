from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve_app.cache.disk import ProcessMark, free_bytes
from serve_app.cache.leases import Leases
from serve_app.cache.space import make_room
from serve_app.cache.store import READY, Store
from serve_app.config import CacheConfig
from serve_app.errors import DiskFullError
from tests.cache.copies import publish

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
    leases.take("m", "new", ProcessMark(mine.host, child.pid, time.time()))
    leases.take("m", "old", mine)
    assert leases.in_use() == {("m", "new"), ("m", "old")}
    child.communicate(b"")
    assert leases.in_use() == {("m", "old")}
    assert len(list((tmp_path / ".leases").iterdir())) == 1

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cache.disk import (
    ProcessMark,
    disk_errors,
    filesystem_type,
    free_bytes,
    refuse_network_filesystem,
)
from serve_app.errors import CacheError, DiskFullError

MOUNTS = """/dev/root / ext4 rw 0 0
server:/home {home} nfs4 rw 0 0
/dev/nvme0n1 {home}/local xfs rw 0 0
s3 {home}/with\\040space fuse.s3fs rw 0 0
me {home}/mine fuse.bindfs rw 0 0
"""


def test_filesystem_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = MOUNTS.format(home=tmp_path)
    assert filesystem_type(tmp_path / "models", mounts) == "nfs4"
    assert filesystem_type(Path("/usr"), mounts) == "ext4"
    (tmp_path / "local").mkdir()
    assert filesystem_type(tmp_path / "local" / "not" / "yet" / "there", mounts) == "xfs"


def test_network_filesystems_are_refused_and_local_ones_taken(tmp_path: Path) -> None:
    mounts = MOUNTS.format(home=tmp_path)
    for name in ("local", "with space", "mine"):
        (tmp_path / name).mkdir()
    for refused, kind in ((tmp_path, "nfs4"), (tmp_path / "with space", "fuse.s3fs")):
        with pytest.raises(CacheError, match=rf"{kind}.*allow_network_filesystem"):
            refuse_network_filesystem(refused, mounts)
    for taken in (tmp_path / "local", tmp_path / "mine", Path("/usr")):
        refuse_network_filesystem(taken, mounts)


def test_this_machines_own_mounts_are_read(tmp_path: Path) -> None:
    assert filesystem_type(tmp_path)
    refuse_network_filesystem(tmp_path)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskFullError, match=rf"model.*{tmp_path}.*make space"), disk_errors("model", tmp_path):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_what_may_not_be_written_is_named(tmp_path: Path, code: int) -> None:
    refused = pytest.raises(CacheError, match=r"model: /some/file: (Permission denied|Read-only)")
    with refused, disk_errors("model", tmp_path):
        raise OSError(code, os.strerror(code), "/some/file")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), disk_errors("model", tmp_path):
        tmp_path.read_bytes()


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    mine = ProcessMark.mine()
    assert ProcessMark.parse(str(mine)).is_alive() is True
    assert ProcessMark(mine.space, mine.pid, mine.started - 1000).is_alive() is False


def test_a_dead_process_is_dead_and_one_of_another_container_unknown() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    mine = ProcessMark.mine()
    assert ProcessMark(mine.space, child.pid, mine.started).is_alive() is False
    assert ProcessMark("another-space", mine.pid, mine.started).is_alive() is None

"""What this node's operating system says of the disk under the cache, and of the processes that use it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve_app.errors import CacheError, DiskFullError

_NETWORK_FILESYSTEMS = re.compile(
    "afs|beegfs|ceph|cifs|gfs2|glusterfs|gpfs|lustre|ncpfs|nfs4?|orangefs|panfs|smb3|smbfs"
    r"|fuse\.(blobfuse|ceph|cvmfs|gcsfuse|gluster|goofys|juicefs|lustre|mountpoint|rclone|s3fs|sshfs).*"
)

_CLOCK_SLACK_S = 5.0


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the filesystem of `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into DiskFullError that says what did not fit where.

    Where something may not be read or written, CacheError that names it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ran_full(what, folder) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CacheError(f"{what}: {error.filename or folder}: {error.strerror}") from error
        raise


def ran_full(what: str, folder: Path) -> DiskFullError:
    free = free_bytes(folder)
    return DiskFullError(f"{what}: the disk of {folder} ran full ({free} bytes are free); make space and try again")


def filesystem_type(folder: Path, mounts: str | None = None) -> str:
    """The type of the filesystem that `folder` is on, from `mounts` in the format of /proc/mounts; "" if unknown."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text("utf-8", "replace")
        except OSError:
            return ""
    place = _existing(folder).resolve()
    best, found = Path("/"), ""
    for line in mounts.splitlines():
        _, mount_point, kind, *_ = line.split(" ")
        point = Path(mount_point.replace("\\040", " "))
        if (point == place or point in place.parents) and len(point.parts) >= len(best.parts):
            best, found = point, kind
    return found


def refuse_network_filesystem(root: Path, mounts: str | None = None) -> None:
    """Raises CacheError if `root` is on a filesystem that other machines share."""
    kind = filesystem_type(root, mounts)
    if _NETWORK_FILESYSTEMS.fullmatch(kind):
        raise CacheError(
            f"cache.root {root} is on a network filesystem ({kind}): every node would write the same files, and every "
            "start would read them over the network. Use a local disk, or set cache.allow_network_filesystem: true"
        )


def boot_id() -> str:
    """Changes when this machine starts again; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def process_space() -> str:
    """Where a process number means the same process as here: the boot of this machine, and the PID namespace in it.

    Containers have namespaces of their own, often on one machine and even with one host name.
    """
    try:
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = socket.gethostname()
    return f"{boot_id() or socket.gethostname()}.{namespace}"


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """One process: tells it from others with its number, in other containers and at other times."""

    space: str
    """As `process_space` tells it there."""
    pid: int
    started: float
    """Seconds since the epoch."""

    @classmethod
    def mine(cls) -> ProcessMark:
        return cls(process_space(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"{self.space}@{self.pid}@{self.started:.0f}"

    @classmethod
    def parse(cls, text: str) -> ProcessMark:
        """Raises ValueError if `text` is not one."""
        space, pid, started = text.split("@")
        return cls(space, int(pid), float(started))

    def is_alive(self) -> bool | None:
        """None if it is a process of another machine, boot or container, of which this one knows nothing."""
        if self.space != process_space():
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < _CLOCK_SLACK_S
        except psutil.NoSuchProcess:
            return False

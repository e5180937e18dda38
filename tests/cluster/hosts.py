"""Hosts made of Linux namespaces: each has its own network address, mounts and processes, and sees no other's files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

SUBNET = "10.77.0"
GATEWAY = f"{SUBNET}.1"
BRIDGE = "sa-hosts"
DISK = "/mnt"
"""Where each host has a disk of its own, in memory."""
RUN_S = 150.0


def reason_why_not() -> str | None:
    """Why such hosts cannot be made here; None if they can."""
    missing = _what_is_missing()
    return None if missing is None else f"hosts in network namespaces need {missing}"


def missing_for_root(*commands: str) -> str | None:
    """What is missing here to run these commands as root on Linux; None if nothing is."""
    if sys.platform != "linux":
        return f"Linux, and this is {sys.platform}"
    if os.geteuid() != 0:
        return f"root, and this is user {os.geteuid()}"
    absent = [name for name in commands if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}, not found here (.ci/install-system-packages installs them on Debian)"
    return None


OTHER_USER = 54321
"""A user id without an account."""


def as_other_user() -> tuple[str, ...]:
    """What to put before a command for that user to run it. The test is skipped where that cannot be done."""
    missing = missing_for_root("setpriv")
    if missing is not None:
        pytest.skip(f"another user needs {missing}")
    return ("setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups")


def _what_is_missing() -> str | None:
    missing = missing_for_root("ip", "unshare", "nsenter", "mount")
    if missing is not None:
        return missing
    probe = subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True, check=False)
    if probe.returncode == 0:
        return None
    return f"`unshare -n -m`, which fails here: {probe.stderr.decode().strip()}"


class Host:
    """One host; its first process holds the namespaces, and all others end with it."""

    def __init__(self, number: int, disk_mib: int) -> None:
        self.name = f"sa-h{number}"
        self.address = f"{SUBNET}.{number + 1}"
        self._started: list[subprocess.Popen[bytes]] = []
        _ip("netns", "add", self.name)
        _ip("link", "add", f"{self.name}-o", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", f"{self.name}-o", "master", BRIDGE, "up")
        for command in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _ip("-n", self.name, *command)
        _ip("-n", self.name, "link", "set", "lo", "up")
        mounts = f"mount -t tmpfs -o size={disk_mib}m disk {DISK}"
        mounts += " && mkdir -p /tmp/ray && mount -t tmpfs ray /tmp/ray && mount -t tmpfs -o size=256m shm /dev/shm"
        enter = ["ip", "netns", "exec", self.name, "unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child"]
        first = f"{mounts} && echo ready && exec sleep infinity"
        self._first = subprocess.Popen([*enter, "sh", "-c", first], stdout=subprocess.PIPE, text=True)
        assert self._first.stdout is not None
        assert self._first.stdout.readline() == "ready\n", f"{self.name} did not start"
        self._pid = _only_child(self._first.pid)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Run until the host stops; what it says goes to `log`."""
        full = {**os.environ, **environment}
        with log.open("w") as stream:
            self._started.append(
                subprocess.Popen([*self._enter(), *command], env=full, stdout=stream, stderr=subprocess.STDOUT)
            )

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        full = {**os.environ, **(environment or {})}
        everything = [*self._enter(), *command]
        return subprocess.run(everything, env=full, capture_output=True, text=True, timeout=RUN_S, check=False)

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._pid), "-n", "-m", "-p", f"--wd={os.getcwd()}"]

    def sums(self, folder: str) -> dict[str, str]:
        """Path → sha256 of all files below `folder` on this host's disk whose name does not begin with a dot."""
        found = self.run("sh", "-c", f"cd {folder} && find . -type f -not -name '.*' -exec sha256sum {{}} +").stdout
        return {line[66:].removeprefix("./"): line[:64] for line in found.splitlines()}

    def resize_disk(self, mib: int) -> None:
        assert self.run("mount", "-o", f"remount,size={mib}m", DISK).returncode == 0

    def stop(self) -> None:
        self._first.send_signal(signal.SIGKILL)
        self._first.wait()
        for process in self._started:
            process.wait()
        assert self._first.stdout is not None
        self._first.stdout.close()
        _ip("netns", "del", self.name)


def _only_child(pid: int) -> int:
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        time.sleep(0.01)
    return int(children[0])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _clear_what_a_killed_run_left() -> None:
    """Names outlive the process that made them, and would be refused to the next run."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.startswith("sa-h")]:
        subprocess.run(["ip", "link", "del", f"{name}-o"], capture_output=True, check=False)
        _ip("netns", "del", name)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@contextmanager
def hosts(disks_mib: Sequence[int]) -> Iterator[list[Host]]:
    """As many hosts as there are disk sizes, on one bridge, on which this process has the address GATEWAY."""
    made: list[Host] = []
    _clear_what_a_killed_run_left()
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number, disk_mib in enumerate(disks_mib, start=1):
            made.append(Host(number, disk_mib))
        yield made
    finally:
        for host in made:
            host.stop()
        _ip("link", "del", BRIDGE)

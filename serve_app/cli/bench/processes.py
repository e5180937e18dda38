"""The processes of a server on this machine, and what they use."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_RAY_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_[\d-]+_\d+_\d+")


_REPLICA = re.compile(r"ray::ServeReplica:.*(?:-(model|tokenizer)|:(ingress))(?=[.\s]|$)")
_SERVE = ("ray::ServeController", "ray::HAProxyManager", "ray::ProxyActor")


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of one process that is in RAM, shared pages included."""

    pid: int
    kind: str
    """As `kind_of` says it."""
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server's processes hold at one moment; `uss_bytes` is memory that no other process shares."""

    processes: int
    uss_bytes: int
    descriptors: int
    threads: int
    resident: tuple[Resident, ...] = ()
    """Of each process."""


@dataclass(slots=True)
class ServerProcesses:
    """The trees below some processes; processes may come and go."""

    roots: tuple[int, ...]
    _before: dict[tuple[int, float], float] = field(default_factory=dict)

    def mark(self) -> None:
        """Count CPU time from now."""
        self._before = dict(self._cpu_times())

    def cpu_s(self) -> float:
        """Seconds of CPU since `mark`, of processes that are still there."""
        return sum(seconds - self._before.get(key, 0.0) for key, seconds in self._cpu_times())

    def usage(self) -> Usage:
        """Reads every mapping of every process, which takes tens of milliseconds: not while the clock runs."""
        found = list(self._usages())
        return Usage(
            processes=len(found),
            uss_bytes=sum(usage.uss_bytes for usage in found),
            descriptors=sum(usage.descriptors for usage in found),
            threads=sum(usage.threads for usage in found),
            resident=tuple(resident for usage in found for resident in usage.resident),
        )

    def _cpu_times(self) -> Iterator[tuple[tuple[int, float], float]]:
        for process in _trees(self.roots):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                yield (process.pid, process.create_time()), times.user + times.system

    def _usages(self) -> Iterator[Usage]:
        for process in _trees(self.roots):
            with contextlib.suppress(psutil.Error):
                memory, kind = process.memory_full_info(), kind_of(process.cmdline())
                resident = Resident(process.pid, kind, memory.rss)
                yield Usage(1, memory.uss, process.num_fds(), process.num_threads(), (resident,))


def kind_of(command: Sequence[str]) -> str:
    """What a process of a server is: a replica of one of the tiers, Serve's, HAProxy, or another one, mostly Ray's."""
    title = " ".join(command)
    replica = _REPLICA.match(title)
    if replica is not None:
        return f"{replica[1] or replica[2]} replica"
    if title.startswith(_SERVE):
        return "Serve"
    return "HAProxy" if command and Path(command[0]).name == "haproxy" else "other"


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_server(port: int) -> ServerProcesses | None:
    """The server that listens on a port of this machine, or None if that cannot be seen.

    For Ray these are all the processes of its session: the head's services are not children of what listens.
    """
    listening = sorted(_listening(port))
    if not listening:
        return None
    session = next(filter(None, map(_ray_session, listening)), None)
    return ServerProcesses((*listening, *(_members(session) if session else ())))


def _listening(port: int) -> Iterator[int]:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            is_it = connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,)
            if is_it and connection.pid:
                yield connection.pid


def _ray_session(pid: int) -> str | None:
    """Name of the Ray session that a process belongs to: its raylet, above it, names it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for ancestor in (process, *process.parents()):
            found = _RAY_SESSION.search(" ".join(ancestor.cmdline()))
            if found:
                return found[0]
    return None


def _members(session: str) -> Iterator[int]:
    """The session's services, and the Python process that started them, if it has stayed as `serve run` does."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if session not in _RAY_SESSION.findall(" ".join(command)):
                continue
            yield process.pid
            parent = process.parent()
            if command[0].endswith("raylet") and parent is not None and "python" in Path(parent.exe()).name:
                yield parent.pid


def _trees(roots: Iterable[int]) -> list[psutil.Process]:
    """The roots that live and all their descendants, each once."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(root)
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())

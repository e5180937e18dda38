"""What a model replica sets on its host: its share of the cores, how its heap is kept; and what the host has left."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""From glibc's malloc.h."""

_CGROUP_FILES = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a cgroup of version 2 and of version 1: files with its limits, file with its usage, and the line of `memory.stat`
with the page cache in that usage which the kernel gives up before anything else."""


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes(process: Path = Path("/proc/self")) -> int:
    """Bytes that this process can still take: what the machine has available, or less where a cgroup limits it.

    Each cgroup of the process and each above it leaves its limit minus its usage, and page cache that is not in use
    does not count as usage. `process` is the folder in /proc with the process's `cgroup` and `mountinfo`.
    """
    left = [left for folder in _memory_cgroups(process) if (left := _left_in(folder)) is not None]
    return max(0, min([psutil.virtual_memory().available, *left]))


def _memory_cgroups(process: Path) -> Iterator[Path]:
    """Folders of the process's cgroups of either version, each with all above it that can be seen from here."""
    paths: dict[str, str] = {}
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= {"cgroup2": path} if not controllers else {}
        paths |= {"cgroup": path} if "memory" in controllers.split(",") else {}
    for line in _lines(process / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = filesystem.split(" ", 2)
        if kind in paths and (kind == "cgroup2" or "memory" in options.split(",")):
            inside = os.path.relpath(paths[kind], root)
            folder = Path(point) if inside.startswith("..") else Path(point, inside)  # ..: of another namespace
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(point))


def _left_in(cgroup: Path) -> int | None:
    """Bytes that one cgroup leaves to its processes; None where it has no limit."""
    for limit_files, usage_file, cache_line in _CGROUP_FILES:
        limits = [limit for name in limit_files if (limit := _number(cgroup / name)) is not None]
        usage = _number(cgroup / usage_file)
        if limits and usage is not None:
            statistics = dict(line.split() for line in _lines(cgroup / "memory.stat"))
            return min(limits) - (usage - int(statistics.get(cache_line, 0)))
    return None


def _number(file: Path) -> int | None:
    """None where there is no such file, or `max` in it."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def fast_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions, as Linux tells it (`avx512_bf16`, `amx_bf16`, or `bf16` on Arm)."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu.split()))


def govern_threads(num_threads: int) -> int:
    """Give the calling thread `num_threads` intra-op threads, at most one for each core; returns how many.

    Call it on the thread that will compute: OpenMP keeps the number for each calling thread.
    """
    granted = max(1, min(num_threads, available_cores()))
    torch.set_num_threads(granted)
    return granted


def keep_freed_memory() -> bool:
    """Make glibc keep what is freed, so that the next batch does not fault the same pages in again.

    Activations of one layer are megabytes; by default each is returned to the system when freed and cleared by it when
    allocated again, which cost 10 to 30 % of a forward pass. The process keeps its peak, which the token budget bounds.
    What is free at the time of the call is given back, so call it when loading is done. Returns False where the C
    library has no mallopt (nothing is changed then).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    give_back_freed_memory()
    largest_threshold = 32 << 20  # glibc refuses more
    return all(
        mallopt(option, value)
        for option, value in (
            (_M_MMAP_THRESHOLD, largest_threshold),
            (_M_TRIM_THRESHOLD, (1 << 31) - 1),
            (_M_TOP_PAD, 64 << 20),
        )
    )


def give_back_freed_memory() -> None:
    """Return to the system what glibc keeps free; the next batch faults its pages in again. Elsewhere nothing happens.

    While it runs, other threads wait for memory, so call it when there is nothing to do.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    malloc_trim(0)

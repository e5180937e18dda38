"""What a model replica sets on its host: its share of the cores, and a heap that is not given back after each batch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""From glibc's malloc.h."""


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that this process may still take without swapping."""
    return int(psutil.virtual_memory().available)


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
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError):
        return False
    malloc_trim(0)
    largest_threshold = 32 << 20  # glibc refuses more
    return all(
        mallopt(option, value)
        for option, value in (
            (_M_MMAP_THRESHOLD, largest_threshold),
            (_M_TRIM_THRESHOLD, (1 << 31) - 1),
            (_M_TOP_PAD, 64 << 20),
        )
    )

"""What a server holds, which must not grow with what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence

import psutil

from serve_app.model.host import give_back_freed_memory

Held = Callable[[], Mapping[str, float]]

_MOST_MORE = {"tasks": 3, "objects": 3000, "descriptors": 10, "threads": 8, "rss_mb": 96.0}
"""How much more of each a server may hold after the second round than after the first."""

_SHARE = 0.02
"""The same for dozens of processes, as a share of what they held, where that is more."""

_FROM_THE_START = ("tasks",)
"""More than at the start, even: pools of threads, connections and memory fill with the first requests."""


def held_here(loop: asyncio.AbstractEventLoop) -> Mapping[str, float]:
    """By this process, with the event loop that the server runs on; not what the C library keeps free for later."""
    gc.collect()
    give_back_freed_memory()
    return {"tasks": _tasks(loop), "objects": len(gc.get_objects()), **held_by_processes([psutil.Process()])}


def _tasks(loop: asyncio.AbstractEventLoop) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), loop).result(timeout=60)


def held_by_processes(processes: Iterable[psutil.Process]) -> Mapping[str, float]:
    descriptors = threads = rss = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            descriptors += process.num_fds()
            threads += process.num_threads()
            rss += process.memory_info().rss
    return {"descriptors": descriptors, "threads": threads, "rss_mb": round(rss / 1e6, 1)}


def bound_faults(held: Sequence[Mapping[str, float]]) -> list[str]:
    """What has grown, in words: `held` is what was held at the start and after each of two rounds."""
    if len(held) < 3:
        return []
    start, before, after = held
    share = 0.0 if "tasks" in start else _SHARE
    before = {**before, **{name: start[name] for name in _FROM_THE_START if name in start}}
    return [
        f"{name} grew from {before[name]} to {after[name]}"
        for name, most in _MOST_MORE.items()
        if name in before and after[name] - before[name] > max(most, share * before[name])
    ]

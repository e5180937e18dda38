"""What a server spends on one request: the longest turn of its event loop, and how much it grew meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

_BEAT_S = 0.002
_LOOK_S = 0.02


@dataclass(slots=True)
class Spent:
    """`turn_s` is time of the event loop's thread on the CPU: neither other threads nor other processes lengthen it."""

    turn_s: float = 0.0
    grew_mb: float = 0.0


def unit_s() -> float:
    """The same on this machine of a million steps of Python, as a measure for turns."""
    started = time.thread_time()
    steps = 0
    while steps < 1_000_000:
        steps += 1
    return time.thread_time() - started


@contextlib.contextmanager
def watched(loop: asyncio.AbstractEventLoop) -> Iterator[Spent]:
    """What this process and its event loop spend in the block; known at its end."""
    spent, over = Spent(), threading.Event()
    # What earlier tests left in this process would make a turn of any in which Python looks for garbage.
    gc.collect()
    gc.freeze()
    beating = asyncio.run_coroutine_threadsafe(_beat(spent, over), loop)
    looking = threading.Thread(daemon=True, target=_look, args=(spent, over), name="looking")
    looking.start()
    try:
        yield spent
    finally:
        over.set()
        beating.result(timeout=60)
        looking.join()
        gc.unfreeze()


async def _beat(spent: Spent, over: threading.Event) -> None:
    before = time.thread_time()
    while not over.is_set():
        await asyncio.sleep(_BEAT_S)
        now = time.thread_time()
        spent.turn_s, before = max(spent.turn_s, now - before), now


def _look(spent: Spent, over: threading.Event) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    while not over.wait(_LOOK_S):
        spent.grew_mb = max(spent.grew_mb, (process.memory_info().rss - before) / 1e6)

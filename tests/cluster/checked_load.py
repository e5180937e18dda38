"""Steady load whose every answer is compared with the right one."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

TIMEOUT_S = 90.0

Ask = Callable[[httpx.AsyncClient, int], Awaitable[str]]
"""Sends the request of a number and returns which version answered. Raises AssertionError if the answer is wrong, and
httpx.HTTPStatusError if there is none."""


@dataclass
class Seen:
    """What one stream of requests has seen. Times are on time.monotonic's clock."""

    answered: list[tuple[float, str]] = field(default_factory=list)
    """When, and by which version."""
    failed: list[tuple[float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def versions_since(self, when: float) -> set[str]:
        return {version for at, version in self.answered if at >= when}

    def longest_pause_s(self, since: float, until: float) -> float:
        """Without an answer."""
        times = [since, *(at for at, _ in self.answered if since <= at <= until), until]
        return max(after - before for before, after in itertools.pairwise(times))


@dataclass
class Load:
    """One stream of requests for each entry of `streams`."""

    streams: Mapping[str, Seen]
    started_at: float

    def since(self, when: float) -> dict[str, tuple[list[str], list[str]]]:
        """What went wrong since: failed and wrong answers of each stream, where there are any."""
        found = {
            name: ([text for at, text in seen.failed if at >= when], seen.wrong) for name, seen in self.streams.items()
        }
        return {name: told for name, told in found.items() if any(told)}


@contextmanager
def checked_load(base_url: str, asks: Mapping[str, Ask], per_second: float) -> Iterator[Load]:
    """Each of `asks` is sent `per_second` times a second, whether or not the requests before have been answered."""
    load = Load({name: Seen() for name in asks}, time.monotonic())
    ended = threading.Event()
    thread = threading.Thread(
        daemon=True, target=asyncio.run, args=(_run(base_url, asks, load, per_second, ended),), name="load"
    )
    thread.start()
    try:
        yield load
    finally:
        ended.set()
        thread.join()


async def _run(base_url: str, asks: Mapping[str, Ask], load: Load, per_second: float, ended: threading.Event) -> None:
    tasks: set[asyncio.Task[None]] = set()
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S, trust_env=False) as client:
        number = 0
        while not ended.is_set():
            for name, ask in asks.items():
                task = asyncio.create_task(_one(client, ask, number, load.streams[name]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, load.started_at + number / per_second - time.monotonic()))
        await asyncio.gather(*tasks)


async def _one(client: httpx.AsyncClient, ask: Ask, number: int, seen: Seen) -> None:
    started = time.monotonic()
    try:
        version = await ask(client, number)
        seen.answered.append((time.monotonic(), version))
    except AssertionError as error:
        seen.wrong.append(f"after {time.monotonic() - started:.1f} s: {error}")
    except httpx.HTTPStatusError as error:
        seen.failed.append((time.monotonic(), f"{error.response.status_code} {error.response.text[:300]}"))
    except httpx.HTTPError as error:
        seen.failed.append((time.monotonic(), repr(error)))
    seen.slowest_s = max(seen.slowest_s, time.monotonic() - started)

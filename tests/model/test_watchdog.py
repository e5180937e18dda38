"""A forward that takes long is left alone; one that does not end is told."""

from __future__ import annotations

import threading

import pytest

from serve_app.errors import UnavailableError
from serve_app.model.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def computed(watchdog: Watchdog, clock: Clock, seconds: float) -> None:
    with watchdog.computing():
        clock.now += seconds


def test_a_replica_without_work_never_hangs(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    computed(watchdog, clock, 1)
    clock.now += 10_000
    watchdog.check()


def test_a_forward_hangs_beyond_the_limit_and_no_longer_when_it_has_ended(clock: Clock) -> None:
    watchdog = Watchdog(max_s=30, clock=clock)
    with watchdog.computing():
        clock.now += 30
        watchdog.check()
        clock.now += 1
        assert watchdog.hangs
        with pytest.raises(UnavailableError, match=r"31 s and does not answer; .* raise max_forward_s, here 30"):
            watchdog.check()
    watchdog.check()


def test_a_limit_that_is_changed_counts_at_once(clock: Clock) -> None:
    watchdog = Watchdog(max_s=30, clock=clock)
    with watchdog.computing():
        clock.now += 50
        watchdog.max_s = 60
        watchdog.check()


def test_one_that_failed_is_over_as_well(clock: Clock) -> None:
    watchdog = Watchdog(clock=clock)
    with pytest.raises(ValueError, match="bad"), watchdog.computing():
        raise ValueError("bad")
    clock.now += 1000
    watchdog.check()


def test_where_forwards_take_seconds_the_limit_is_twenty_times_that(clock: Clock) -> None:
    watchdog = Watchdog(max_s=30, clock=clock)
    computed(watchdog, clock, 5)
    assert watchdog.limit_s == 100
    assert Watchdog(max_s=30, usual_s=4, clock=clock).limit_s == 80
    assert Watchdog(max_s=30, usual_s=0.1, clock=clock).limit_s == 30


def test_a_stall_does_not_raise_the_limit(clock: Clock) -> None:
    watchdog = Watchdog(max_s=30, clock=clock)
    computed(watchdog, clock, 31)
    assert watchdog.limit_s == 30


def test_what_was_slow_once_is_forgotten(clock: Clock) -> None:
    watchdog = Watchdog(max_s=30, usual_s=0.1, clock=clock)
    computed(watchdog, clock, 20)
    assert watchdog.limit_s == 400
    for _ in range(500):
        computed(watchdog, clock, 0.1)
    assert watchdog.limit_s == 30


def test_of_several_threads_the_one_that_has_computed_longest_counts(clock: Clock) -> None:
    watchdog, entered, go = Watchdog(max_s=30, clock=clock), threading.Event(), threading.Event()

    def hang() -> None:
        with watchdog.computing():
            entered.set()
            go.wait(30)

    thread = threading.Thread(daemon=True, target=hang)
    thread.start()
    assert entered.wait(10)
    clock.now += 20
    computed(watchdog, clock, 0)
    with watchdog.computing():
        clock.now += 11
        assert watchdog.hangs
    go.set()
    thread.join()
    assert not watchdog.hangs

"""How long to stay away from a replica whose queue is full."""

from __future__ import annotations

import pytest

from serve_app.errors import LEAST_WAIT_S, MOST_WAIT_S, OverloadedError
from serve_app.model.scheduler import Limits, Scheduler
from serve_app.model.speed import Speed
from tests.model.batches import job


def test_the_wait_is_what_is_ahead_at_the_measured_speed() -> None:
    speed = Speed()
    assert speed.wait_s(1e9) == LEAST_WAIT_S
    for _ in range(5):
        speed.add(200, 2.0)
    assert speed.wait_s(500) == pytest.approx(5)
    assert speed.wait_s(-1) == LEAST_WAIT_S
    assert speed.wait_s(1e9) == MOST_WAIT_S


def test_a_new_speed_is_soon_believed() -> None:
    speed = Speed()
    speed.add(10_000, 100.0)
    for _ in range(60):
        speed.add(10, 1.0)
    assert speed.wait_s(300) == pytest.approx(30, rel=0.5)


def test_a_full_queue_tells_when_half_of_its_room_is_free() -> None:
    """300 tokens wait, 200 more than half of the room, at 20 tokens/s."""
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_batch_sequences=8, max_queued_tokens=200))
    scheduler.computed(100, 5.0)
    scheduler.submit(job([100] * 3))
    with pytest.raises(OverloadedError) as refused:
        scheduler.submit(job([1]))
    assert refused.value.retry_after_s == pytest.approx(10)

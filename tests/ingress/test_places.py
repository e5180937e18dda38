"""How many may be under way, and when to come back."""

from __future__ import annotations

import pytest

from serve_app.errors import OverloadedError
from serve_app.ingress.places import Pace, Places


def paced(*seconds: float) -> Pace:
    pace = Pace()
    for each in seconds:
        pace.took(each)
    return pace


def test_half_of_the_places_are_free_after_half_the_time_that_requests_take() -> None:
    assert paced(8.0).wait_s(under_way=1000, most=1000) == 4.0
    assert paced(*[8.0] * 50).wait_s(under_way=10, most=10) == pytest.approx(4.0)


def test_more_under_way_than_there_are_places_takes_longer() -> None:
    """Which is so after the operator has lowered their number."""
    assert paced(8.0).wait_s(under_way=1000, most=500) == 6.0


def test_it_is_told_within_bounds() -> None:
    assert paced().wait_s(1, 1) == 1.0
    assert paced(0.01).wait_s(1000, 1000) == 1.0
    assert paced(1e6).wait_s(1000, 1000) == 60.0


def test_the_pace_follows_what_requests_take_now() -> None:
    pace = paced(10.0, *[2.0] * 200)
    assert pace.wait_s(100, 100) == pytest.approx(1.0, rel=0.01)
    assert paced(2.0, *[20.0] * 200).wait_s(100, 100) == pytest.approx(10.0, rel=0.01)


def test_no_more_are_under_way_than_there_are_places() -> None:
    places = Places()
    for _ in range(2):
        places.take(2, "requests are under way")
    with pytest.raises(OverloadedError, match="2 requests are under way here; come back later") as refused:
        places.take(2, "requests are under way")
    assert refused.value.retry_after_s == 1.0
    places.leave(after_s=0.5)
    places.take(2, "requests are under way")


def test_what_takes_several_places_is_refused_where_there_are_fewer() -> None:
    places = Places()
    places.take(10, "bytes are under way", 7)
    with pytest.raises(OverloadedError, match="10 bytes are under way"):
        places.take(10, "bytes are under way", 4)
    places.take(10, "bytes are under way", 3)
    places.leave(0.5, 7)
    places.take(10, "bytes are under way", 7)

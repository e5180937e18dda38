"""What a client asks of how its request is treated: how long it may take, and whether others go first."""

from __future__ import annotations

from typing import cast, get_args

from serve_app.errors import MalformedRequestError
from serve_app.types import Priority

TIMEOUT = b"x-request-timeout-ms"
"""The request header: whole milliseconds from the request's arrival to its answer."""

PRIORITY = b"x-priority"
"""The request header: `interactive`, or `bulk` for a request that waits while interactive ones are there."""

BULK_SHARE = 0.75
"""Of the requests and the tokens that may be here at a time, so that bulk requests leave room for interactive ones."""

_MOST_DIGITS = 12


def asked_timeout_s(value: bytes, most_s: float) -> float:
    """Seconds that the header asks for, at most `most_s`. Raises MalformedRequestError, which does not repeat it."""
    if not (value.isdigit() and len(value) <= _MOST_DIGITS and int(value)):
        raise MalformedRequestError(f"the header {TIMEOUT.decode()} must be a whole number of milliseconds above 0")
    return min(most_s, int(value) / 1e3)


def asked_priority(value: bytes) -> Priority:
    """What the header asks for. Raises MalformedRequestError, which does not repeat it."""
    name = value.decode("latin-1")
    if name not in get_args(Priority):
        raise MalformedRequestError(f"the header {PRIORITY.decode()} must be {' or '.join(get_args(Priority))}")
    return cast("Priority", name)


def room_for(priority: Priority, most: int) -> int:
    """How many of `most` there may be before one of this priority is refused, at least one."""
    return most if priority == "interactive" else max(1, int(BULK_SHARE * most))

"""How long a client gives its request."""

from __future__ import annotations

from serve_app.errors import MalformedRequestError

TIMEOUT = b"x-request-timeout-ms"
"""The request header: whole milliseconds from the request's arrival to its answer."""

_MOST_DIGITS = 12


def asked_timeout_s(value: bytes, most_s: float) -> float:
    """Seconds that the header asks for, at most `most_s`. Raises MalformedRequestError, which does not repeat it."""
    if not (value.isdigit() and len(value) <= _MOST_DIGITS and int(value)):
        raise MalformedRequestError(f"the header {TIMEOUT.decode()} must be a whole number of milliseconds above 0")
    return min(most_s, int(value) / 1e3)

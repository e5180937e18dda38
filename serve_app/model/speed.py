"""How fast a replica works through its queue, as far as it has seen."""

from __future__ import annotations

import math

from serve_app.errors import bounded_wait_s

MEMORY_S = 10.0
"""Seconds of work after which a measured speed counts for 1/e."""


class Speed:
    """Tokens (or whatever is counted) in a second of work. Written by one thread; a reader may be one entry behind."""

    def __init__(self) -> None:
        self._done = 0.0
        self._busy_s = 0.0

    def add(self, done: float, seconds: float) -> None:
        fade = math.exp(-seconds / MEMORY_S)
        self._done, self._busy_s = self._done * fade + done, self._busy_s * fade + seconds

    def wait_s(self, ahead: float) -> float:
        """Seconds until so many are done, within reason; the least where nothing has been measured."""
        return bounded_wait_s(ahead * self._busy_s / self._done if self._done else 0.0)

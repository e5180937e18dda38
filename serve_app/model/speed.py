"""How fast a replica works through its queue, as far as it has seen."""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""Seconds of work after which a measured speed counts for 1/e."""

LEAST_WAIT_S, MOST_WAIT_S = 1.0, 60.0


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
        if not self._done or not self._busy_s:
            return LEAST_WAIT_S
        return min(MOST_WAIT_S, max(LEAST_WAIT_S, ahead * self._busy_s / self._done))

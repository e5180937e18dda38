"""Tells a forward pass or a step that hangs from one that takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import UnavailableError

TIMES_LONGEST = 20.0
"""How many times as long as one that was seen another one may take: other work on a CPU slows it down several times."""

_FADE = 0.99
"""What a long one counts for after each further one, so that a single stall does not raise the limit for ever."""


class Watchdog:
    """Threads that use the device wrap each forward or step in `computing`; any thread may `check` on them."""

    def __init__(self, max_s: float = 30.0, usual_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`usual_s` is how long a full batch took when the replica started."""
        self.max_s = max_s
        self._usual_s, self._clock = usual_s, clock
        self._longest_s = 0.0
        self._since: dict[int, float] = {}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A forward or step on the calling thread; not to be nested."""
        thread, started = threading.get_ident(), self._clock()
        self._since[thread] = started
        try:
            yield
        finally:
            del self._since[thread]
            self._learn(self._clock() - started)

    @property
    def limit_s(self) -> float:
        """Seconds that a forward or step may take: `max_s`, or 20 times the longest of late, if that is more."""
        return max(self.max_s, TIMES_LONGEST * max(self._usual_s, self._longest_s))

    @property
    def hangs(self) -> bool:
        return self._running_s() > self.limit_s

    def check(self) -> None:
        """Raise UnavailableError while a forward or step runs that is over the limit."""
        running_s = self._running_s()
        if running_s > self.limit_s:
            raise UnavailableError(
                f"the device of this replica has computed one batch for {running_s:.0f} s and does not answer; if "
                f"batches honestly take that long, raise max_forward_s, here {self.max_s:g}",
                retry_after_s=1.0,
            )

    def _learn(self, took_s: float) -> None:
        """One that was over the limit says nothing of how long others may take."""
        self._longest_s = max(_FADE * self._longest_s, took_s if took_s <= self.limit_s else 0.0)

    def _running_s(self) -> float:
        """Seconds of the one that has run longest; 0 while nothing is computed."""
        started = list(self._since.values())
        return self._clock() - min(started) if started else 0.0

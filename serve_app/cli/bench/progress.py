"""How far a measurement is, on stderr; nothing where that is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_FORM = "{desc:<8}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"


class Progress:
    """A bar over seconds of load. `touch` is cheap: it is called for every answer."""

    def __init__(self, total_s: float) -> None:
        self._bar: Any = tqdm(
            total=total_s, bar_format=_FORM, file=sys.stderr, disable=None, mininterval=0.5, miniters=0
        )
        self._done_s = 0.0
        self._part_s = 0.0
        self._started = 0.0

    def touch(self, outcome: object = None) -> None:
        """Move the bar to now."""
        self._show(self._done_s + min(self._part_s, time.perf_counter() - self._started))

    @contextlib.contextmanager
    def part(self, label: str, seconds: float) -> Iterator[None]:
        """What is measured for so many seconds."""
        self._bar.set_description_str(label)
        self._part_s, self._started = seconds, time.perf_counter()
        yield
        self._done_s += seconds
        self._show(self._done_s)

    def close(self) -> None:
        self._bar.close()

    def _show(self, seconds: float) -> None:
        self._bar.update(seconds - self._bar.n)

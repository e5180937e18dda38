"""Threads that compute one at a time, in the order in which they asked: a step each, so that the short is soon done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch


class Turns:
    """Who is first in the queue has the turn."""

    def __init__(self, watching: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """`watching` makes a context around each turn, which is entered and left on the turn's thread."""
        self.watching = watching
        self._changed = threading.Condition()
        self._queue: deque[Turn] = deque()

    def take(self, turn: Turn) -> None:
        """Wait until it is this one's turn."""
        with self._changed:
            self._queue.append(turn)
            self._changed.wait_for(lambda: self._queue[0] is turn)

    def end(self) -> None:
        """Of the one that has it."""
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()


class Turn:
    """A context in which a thread computes, with random numbers of its own, while no other that takes turns does.

    Between two steps `yield_to_others` lets each of the others make one.
    """

    def __init__(self, turns: Turns, device: torch.device, seed: int | None) -> None:
        self._turns = turns
        self._shared = _generator(device)
        own = torch.Generator(device)
        own.manual_seed(seed) if seed is not None else own.seed()
        self._state: Any = own.get_state()
        self._others: Any = None
        self._watched: Any = None

    def __enter__(self) -> Turn:
        self._turns.take(self)
        self._watched = self._turns.watching()
        self._watched.__enter__()
        self._others = self._shared.get_state()
        self._shared.set_state(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._state = self._shared.get_state()
            self._shared.set_state(self._others)
        finally:
            self._watched.__exit__(None, None, None)
            self._turns.end()

    def yield_to_others(self) -> None:
        self.__exit__(None, None, None)
        self.__enter__()


def _generator(device: torch.device) -> Any:
    """What `generate` draws its random numbers from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator

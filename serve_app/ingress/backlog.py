"""How much work one model has before it in this ingress replica, how fast it is done, and when it is too much.

The unit is the token, as far as it is known before tokenizing: four characters. Queue and speed are measured in the
same unit, so that an estimate that is off is off in both, and cancels out in the time to wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import OverloadedError
from serve_app.types import Chat, ModelCard, TextInput, TokenizeRequest

MEMORY_S = 10.0
"""Seconds of work after which a measured speed counts for 1/e."""

CHARACTERS = 4
"""Of one token, roughly."""

LEAST_WAIT_S, MOST_WAIT_S = 1.0, 60.0


class Backlog:
    """Belongs to one event loop. A request is taken whole or not at all."""

    def __init__(self, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_tokens = max_tokens
        self._clock = clock
        self._tokens = 0
        self._done = 0.0
        self._busy_s = 0.0
        self._looked = clock()

    @property
    def tokens(self) -> int:
        """Tokens that wait or are under way."""
        return self._tokens

    @property
    def tokens_per_s(self) -> float:
        """Measured while there was work; 0 if there never was."""
        return self._done / self._busy_s if self._busy_s > 0 else 0.0

    @contextmanager
    def admitted(self, tokens: int) -> Iterator[None]:
        """The block is the request's time here; if it ends well, its tokens count as done.

        Raises OverloadedError if the request does not fit. One that never could fit is taken when there is no other.
        """
        if self._tokens and self._tokens + tokens > self.max_tokens:
            raise OverloadedError(
                f"{self._tokens} tokens wait for this model here, and with the {tokens} of this request they would be "
                f"more than {self.max_tokens}; come back later",
                retry_after_s=self.wait_s(),
            )
        self._look()
        self._tokens += tokens
        done = 0
        try:
            yield
            done = tokens
        finally:
            self._look()
            self._done += done
            self._tokens -= tokens

    def wait_s(self) -> float:
        """Seconds until half of the queue's room is free, at the measured speed."""
        speed = self.tokens_per_s
        if not speed:
            return LEAST_WAIT_S
        return min(MOST_WAIT_S, max(LEAST_WAIT_S, (self._tokens - self.max_tokens / 2) / speed))

    def _look(self) -> None:
        """Count the time since the last look, if there was work in it."""
        now = self._clock()
        if self._tokens:
            passed = now - self._looked
            fade = math.exp(-passed / MEMORY_S)
            self._busy_s = self._busy_s * fade + passed
            self._done *= fade
        self._looked = now


def tokens_in(request: TokenizeRequest, card: ModelCard) -> int:
    """An estimate, at least 1. Of a text that will be cut only what is kept counts; a token id is one."""
    most = card.max_input_tokens if request.long_texts == "truncate" else math.inf
    return math.ceil(sum(min(most, _tokens(value)) for value in request.inputs)) or 1


def _tokens(value: TextInput) -> float:
    if isinstance(value, (str, Chat)):
        return len(value) / CHARACTERS
    return sum(len(part) / CHARACTERS if isinstance(part, str) else 1 for part in value)

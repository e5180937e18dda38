"""How much work one model has before it in this ingress replica, how fast it is done, and when it is too much.

The unit is the token, as far as it is known before tokenizing: four characters. Queue and speed are measured in the
same unit, so that an estimate that is off is off in both, and cancels out in the time to wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import OverloadedError, bounded_wait_s
from serve_app.ingress.asked import room_for
from serve_app.types import Chat, ModelCard, Priority, TextInput, TokenizeRequest

MEMORY_S = 10.0
"""Seconds of work after which a measured speed counts for 1/e."""

CHARACTERS = 4
"""Of one token, roughly."""


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
    def admitted(self, tokens: int, priority: Priority = "interactive") -> Iterator[None]:
        """The block is the request's time here; if it ends well, its tokens count as done.

        Raises OverloadedError if the request does not fit. One that never could fit is taken when there is no other.
        """
        room = room_for(priority, self.max_tokens)
        if self._tokens and self._tokens + tokens > room:
            raise OverloadedError(
                f"{self._tokens} tokens wait for this model here, and with the {tokens} of this request they would be "
                f"more than {room}; come back later",
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
        return self._seconds(self._tokens - self.max_tokens / 2)

    def half_s(self) -> float:
        """Seconds until half of what waits is done, for those that the replicas refuse before the queue is full."""
        return self._seconds(self._tokens / 2)

    def _seconds(self, tokens: float) -> float:
        speed = self.tokens_per_s
        return bounded_wait_s(tokens / speed if speed else 0.0)

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
    """An estimate, at least 1, of what the model computes; a token id is one.

    Of a text that will be cut only what is kept counts. In windows, what neighbours share counts in each, and so does
    the other text of a pair; windows beyond those that a request may have will be refused, and count no more.
    """
    limit = min(card.max_input_tokens, request.max_tokens or card.max_input_tokens)
    prompt = len(request.prompt) / CHARACTERS
    lengths = [_lengths(value, prompt) for value in request.inputs]
    if request.long_texts == "truncate":
        return math.ceil(sum(min(limit, sum(parts)) for parts in lengths)) or 1
    if request.long_texts == "error":
        return math.ceil(sum(map(sum, lengths))) or 1
    whole = sum(sum(parts) for parts in lengths if sum(parts) <= limit)
    windowed = sum(_in_windows(parts, request, limit) for parts in lengths if sum(parts) > limit)
    return math.ceil(whole + min(windowed, request.max_windows * limit)) or 1


def _lengths(value: TextInput, prompt: float) -> list[float]:
    """Tokens of a text, or of both of a pair."""
    if isinstance(value, (str, Chat)):
        return [prompt + len(value) / CHARACTERS]
    texts = [len(part) / CHARACTERS for part in value if isinstance(part, str)]
    return [prompt + texts[0], *texts[1:]] if texts else [len(value)]


def _in_windows(parts: list[float], request: TokenizeRequest, limit: int) -> float:
    """Tokens of all windows of an input that does not fit into one."""
    place = {"only_first": 0, "only_second": len(parts) - 1, "longest_first": parts.index(max(parts))}[request.cut]
    read, other = parts[place], sum(parts) - parts[place]
    room = max(1.0, limit - other)
    stride = request.stride if request.stride < room else room // 2
    windows = max(1, math.ceil((read - room) / (room - stride)) + 1)
    return read + (windows - 1) * stride + windows * other

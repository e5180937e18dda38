"""Answers that `model.generate` makes, each on a thread: beams, and what our steps cannot do.

They take turns, a step each, so that they use the device no more than one alone would, and a short answer need not wait
for a long one. As many are under way as the memory for keys and values has room for, in the order in which they came.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from serve_app.errors import OverloadedError, UnavailableError
from serve_app.model.generation.answering import Answering, failure, gone
from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.sampling import Choice
from serve_app.model.generation.text import Decoder
from serve_app.model.generation.turns import Turn, Turns
from serve_app.model.recovery import is_device_broken
from serve_app.model.speed import Speed
from serve_app.outputs import FinishReason

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Answers that wait to begin; beyond it the replica is overloaded."""

MOST_AT_ONCE = 8


class Room(Protocol):
    """What bounds the answers under way; read whenever one is to begin."""

    @property
    def max_kv_tokens(self) -> int: ...

    @property
    def max_sequences(self) -> int: ...


class _BetweenSteps(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Lets the others make a step, and ends `generate` once nobody waits for the answer."""

    def __init__(self, answering: Answering, closed: threading.Event, turn: Turn) -> None:
        self._answering, self._closed, self._turn = answering, closed, turn

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self._is_over():
            self._turn.yield_to_others()
        return torch.full((input_ids.shape[0],), self._is_over(), dtype=torch.bool, device=input_ids.device)

    def _is_over(self) -> bool:
        return self._answering.abandoned or self._answering.late or self._closed.is_set()


class WholeAnswers:
    """`submit` belongs to the event loop; each answer has a thread, which begins the next ones when it ends."""

    def __init__(
        self,
        decoding: Decoding,
        decoder: Decoder,
        special: frozenset[int],
        computing: Callable[[], Any],
        prepare_thread: Callable[[], Any],
        room: Callable[[], Room],
        on_broken: Callable[[Exception], None],
    ) -> None:
        """`on_broken` is called with an error after which nothing can be computed any more."""
        self._model, self._device, self._encodes = decoding.model, decoding.device, decoding.encodes
        self._decoder, self._special = decoder, special
        self._computing, self._prepare_thread, self._room = computing, prepare_thread, room
        self._on_broken = on_broken
        self._turns = Turns()
        self._lock = threading.Lock()
        self._waiting: deque[Answering] = deque()
        self._begun: dict[Answering, threading.Thread] = {}
        self._closed = threading.Event()
        self._answers = Speed()

    @property
    def active(self) -> int:
        """Answers that hold memory for keys and values."""
        return len(self._begun)

    def submit(self, answering: Answering) -> None:
        """Raises OverloadedError where too many wait."""
        with self._lock:
            self._drop()
            if len(self._waiting) >= MAX_WAITING:
                wait_s = self._answers.wait_s(len(self._waiting) / 2)
                raise OverloadedError("this replica's queue is full; try again later", retry_after_s=wait_s)
            self._waiting.append(answering)
            self._begin()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            waiting, threads = [*self._waiting], [*self._begun.values()]
            self._waiting.clear()
        for answering in waiting:
            answering.fail(_ending())
        for thread in threads:
            thread.join()

    def _drop(self) -> None:
        """Of those that wait, what was given up or is late."""
        self._waiting = deque(answering for answering in self._waiting if not gone(answering))

    def _begin(self) -> None:
        """The oldest, as long as there is room for them."""
        while self._waiting and self._fits(self._waiting[0]):
            answering = self._waiting.popleft()
            thread = threading.Thread(target=self._serve, args=(answering,), name="whole-answer", daemon=True)
            self._begun[answering] = thread
            thread.start()

    def _fits(self, answering: Answering) -> bool:
        room = self._room()
        tokens = sum(map(kv_tokens, self._begun)) + kv_tokens(answering)
        most = min(MOST_AT_ONCE, room.max_sequences)
        return not self._begun or (len(self._begun) < most and tokens <= room.max_kv_tokens)

    def _serve(self, answering: Answering) -> None:
        self._prepare_thread()
        self._answer(answering)
        with self._lock:
            del self._begun[answering]
            self._drop()
            self._begin()

    def _answer(self, answering: Answering) -> None:
        started = time.monotonic()
        try:
            tokens, ends = self._generate(answering)
            self._answers.add(1, time.monotonic() - started)
            if self._closed.is_set():
                answering.fail(_ending())
            elif not gone(answering):
                self._tell(answering, tokens, ends)
        except Exception as error:
            logger.warning("an answer failed", exc_info=True)
            answering.fail(failure(error))
            if is_device_broken(error):
                self._on_broken(error)

    def _generate(self, answering: Answering) -> tuple[list[int], frozenset[int]]:
        """New tokens, and which tokens end an answer."""
        job, config = answering.job, answering.config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ids = torch.tensor([answering.input_ids], dtype=torch.long, device=self._device)
        turn = Turn(self._turns, self._device, job.options.seed)
        with self._computing(), turn:
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_BetweenSteps(answering, self._closed, turn)]),
            )
        first = 1 if self._encodes else ids.shape[1]
        return output[0, first:].tolist(), frozenset(end for end in ends if end is not None)

    def _tell(self, answering: Answering, tokens: list[int], ends: frozenset[int]) -> None:
        if not tokens:
            answering.end_empty()
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            reason: FinishReason | None = None if not last else "stop" if token in ends else "length"
            answering.take(Choice(token), self._decoder, self._special, reason)
            if answering.finished:
                return


def _ending() -> UnavailableError:
    return UnavailableError("the replica that computed this answer is ending", retry_after_s=1.0)


def kv_tokens(answering: Answering) -> int:
    """Tokens whose keys and values an answer comes to hold, in all its beams."""
    return int(answering.config.num_beams or 1) * answering.size.total

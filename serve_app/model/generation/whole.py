"""Answers that `model.generate` makes, each on a thread: beams, and what our steps cannot do.

They take turns, a step each, so that they use the device no more than one alone would, and a short answer need not wait
for a long one. As many are under way as the memory for keys and values has room for, in the order in which they came.
"""

from __future__ import annotations

import logging
import threading
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
from serve_app.outputs import FinishReason

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Answers that wait for a thread; beyond it the replica is overloaded."""

MOST_THREADS = 16

LOOK_AGAIN_S = 1.0
"""Whether what waits is late by now."""


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
    """`submit` belongs to the event loop; threads start as they are needed."""

    def __init__(
        self,
        decoding: Decoding,
        decoder: Decoder,
        special: frozenset[int],
        computing: Callable[[], Any],
        prepare_thread: Callable[[], Any],
        room: Callable[[], Room],
    ) -> None:
        self._model, self._device, self._encodes = decoding.model, decoding.device, decoding.encodes
        self._decoder, self._special = decoder, special
        self._computing, self._prepare_thread, self._room = computing, prepare_thread, room
        self._turns = Turns()
        self._changed = threading.Condition()
        self._waiting: deque[Answering] = deque()
        self._begun: list[Answering] = []
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def active(self) -> int:
        """Answers that hold memory for keys and values."""
        return len(self._begun)

    def submit(self, answering: Answering) -> None:
        """Raises OverloadedError where too many wait."""
        with self._changed:
            self._drop()
            if len(self._waiting) >= MAX_WAITING:
                raise OverloadedError("this replica's queue is full; try again later", retry_after_s=1.0)
            self._waiting.append(answering)
            if len(self._threads) < min(MOST_THREADS, len(self._waiting) + len(self._begun)):
                self._threads.append(threading.Thread(target=self._serve, name="whole-answers", daemon=True))
                self._threads[-1].start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for answering in self._waiting:
            answering.fail(UnavailableError("the replica that computed this answer is ending", retry_after_s=1.0))

    def _drop(self) -> None:
        """Of those that wait, what was given up or is late."""
        self._waiting = deque(answering for answering in self._waiting if not gone(answering))

    def _serve(self) -> None:
        self._prepare_thread()
        while (answering := self._next()) is not None:
            self._answer(answering)
            with self._changed:
                self._begun.remove(answering)
                self._changed.notify_all()

    def _next(self) -> Answering | None:
        """The oldest, once there is room for it; None when closed."""
        with self._changed:
            while not self._closed.is_set():
                self._drop()
                if self._waiting and self._fits(self._waiting[0]):
                    self._begun.append(self._waiting.popleft())
                    return self._begun[-1]
                self._changed.wait(LOOK_AGAIN_S if self._waiting else None)
            return None

    def _fits(self, answering: Answering) -> bool:
        room = self._room()
        tokens = sum(map(kv_tokens, self._begun)) + kv_tokens(answering)
        return not self._begun or (len(self._begun) < room.max_sequences and tokens <= room.max_kv_tokens)

    def _answer(self, answering: Answering) -> None:
        try:
            tokens, ends = self._generate(answering)
        except Exception as error:
            logger.warning("an answer failed", exc_info=True)
            answering.fail(failure(error))
            return
        if self._closed.is_set():
            answering.fail(UnavailableError("the replica that computed this answer is ending", retry_after_s=1.0))
        elif not gone(answering):
            self._tell(answering, tokens, ends)

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
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            reason: FinishReason | None = None if not last else "stop" if token in ends else "length"
            answering.take(Choice(token), self._decoder, self._special, reason)
            if answering.finished:
                return


def kv_tokens(answering: Answering) -> int:
    """Tokens whose keys and values an answer comes to hold, in all its beams."""
    return int(answering.config.num_beams or 1) * answering.size.total

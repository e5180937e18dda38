"""Answers that `model.generate` makes, each on a thread: those of models that our steps cannot batch.

They take turns, a step each, so that they use the device no more than one alone would, and a short answer need not wait
for a long one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from serve_app.errors import UnavailableError
from serve_app.model.generation.answering import Answering, failure, gone
from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.text import Decoder
from serve_app.model.generation.turns import Turn, Turns
from serve_app.model.recovery import is_device_broken

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 8


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
    """`begin` belongs to one thread; each answer has a thread of its own."""

    def __init__(
        self,
        decoding: Decoding,
        decoder: Decoder,
        special: frozenset[int],
        computing: Callable[[], Any],
        prepare_thread: Callable[[], Any],
        on_end: Callable[[Answering, float], None],
        on_broken: Callable[[Exception], None],
        watching: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """`on_end` is called, on the answer's thread, when it holds no memory any more, with the seconds that it took.

        `on_broken` is called with an error after which nothing can be computed any more. `watching` is as for `Turns`.
        """
        self._model, self._device, self._encodes = decoding.model, decoding.device, decoding.encodes
        self._decoder, self._special = decoder, special
        self._computing, self._prepare_thread = computing, prepare_thread
        self._on_end, self._on_broken = on_end, on_broken
        self._turns = Turns(watching)
        self._lock = threading.Lock()
        self._begun: dict[Answering, threading.Thread] = {}
        self._closed = threading.Event()

    @property
    def active(self) -> int:
        """Answers that hold memory for keys and values."""
        return len(self._begun)

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values they may come to hold."""
        with self._lock:
            return sum(answering.kv_tokens for answering in self._begun)

    def begin(self, answering: Answering) -> None:
        thread = threading.Thread(target=self._serve, args=(answering,), name="whole-answer", daemon=True)
        with self._lock:
            if not self._closed.is_set():
                self._begun[answering] = thread
                thread.start()
                return
        answering.fail(_ending())

    def close(self, wait: bool = True) -> None:
        """Every answer ends with its step; without `wait` nobody waits for that."""
        with self._lock:
            self._closed.set()
            threads = [*self._begun.values()]
        for thread in threads if wait else ():
            thread.join()

    def _serve(self, answering: Answering) -> None:
        started = time.monotonic()
        try:
            self._answer(answering)
        finally:
            with self._lock:
                del self._begun[answering]
            self._on_end(answering, time.monotonic() - started)

    def _answer(self, answering: Answering) -> None:
        try:
            self._prepare_thread()
            tokens, ends = self._generate(answering)
            if self._closed.is_set():
                answering.fail(_ending())
            elif not gone(answering):
                answering.take_all(tokens, self._decoder, self._special, ends)
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


def _ending() -> UnavailableError:
    return UnavailableError("the replica that computed this answer is ending", retry_after_s=1.0)

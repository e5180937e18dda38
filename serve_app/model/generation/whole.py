"""Answers that `model.generate` makes, one at a time on a thread of its own: beams, and what our steps cannot do."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from serve_app.errors import OverloadedError, UnavailableError
from serve_app.model.generation.answering import Answering, failure, gone
from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.sampling import Choice
from serve_app.model.generation.text import Decoder
from serve_app.model.speed import Speed
from serve_app.outputs import FinishReason

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Answers that wait for the thread; beyond it the replica is overloaded."""


class _Abandoned(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Ends `generate` at the next step once nobody waits for the answer."""

    def __init__(self, answering: Answering, closed: threading.Event) -> None:
        self._answering, self._closed = answering, closed

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = self._answering.abandoned or self._answering.late or self._closed.is_set()
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)


class WholeAnswers:
    """`submit` belongs to the event loop; the thread starts with the first answer."""

    def __init__(
        self,
        decoding: Decoding,
        decoder: Decoder,
        special: frozenset[int],
        computing: Callable[[], Any],
        prepare_thread: Callable[[], Any],
    ) -> None:
        self._model, self._device, self._encodes = decoding.model, decoding.device, decoding.encodes
        self._decoder, self._special = decoder, special
        self._computing, self._prepare_thread = computing, prepare_thread
        self._waiting: queue.Queue[Answering | None] = queue.Queue()
        self._closed = threading.Event()
        self._answers = Speed()
        self._thread: threading.Thread | None = None

    def submit(self, answering: Answering) -> None:
        """Raises OverloadedError where too many wait."""
        waiting = self._waiting.qsize()
        if waiting >= MAX_WAITING:
            wait_s = self._answers.wait_s(waiting / 2)
            raise OverloadedError("this replica's queue is full; try again later", retry_after_s=wait_s)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="whole-answers", daemon=True)
            self._thread.start()
        self._waiting.put(answering)

    def close(self) -> None:
        self._closed.set()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        self._prepare_thread()
        while (answering := self._waiting.get()) is not None:
            if self._closed.is_set():
                answering.fail(UnavailableError("the replica that computed this answer is ending", retry_after_s=1.0))
            elif not gone(answering):
                self._answer(answering)

    def _answer(self, answering: Answering) -> None:
        started = time.monotonic()
        try:
            tokens, ends = self._generate(answering)
            self._answers.add(1, time.monotonic() - started)
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
        if job.options.seed is not None:
            torch.manual_seed(job.options.seed)
        with self._computing():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_Abandoned(answering, self._closed)]),
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

"""One answer on its way: tokens in, pieces of text out, and where it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from serve_app.errors import (
    DeadlineExceededError,
    ModelFailureError,
    OverloadedError,
    ServeAppError,
    UnavailableError,
)
from serve_app.model.generation.job import GenerationJob
from serve_app.model.generation.sampling import Choice
from serve_app.model.generation.text import Decoder, Detokenizer, StopTexts
from serve_app.model.recovery import is_device_broken
from serve_app.outputs import FinishReason, GeneratedPiece

Item: TypeAlias = GeneratedPiece | ServeAppError


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens that a sequence may come to hold: in the decoder, and of what was encoded."""

    own: int
    encoded: int

    @property
    def total(self) -> int:
        return self.own + self.encoded


class Answering:
    """Made on the event loop, used on the device thread; `emit` may be called from there.

    `abandoned` is set by the event loop when nobody waits for the answer any more.
    """

    def __init__(
        self,
        job: GenerationJob,
        input_ids: tuple[int, ...],
        config: Any,
        size: Size,
        by_steps: bool,
        emit: Callable[[Answering, Item], Any],
    ) -> None:
        """`config` is this job's own generation config, whose `max_new_tokens` the window bounds.

        `by_steps` is whether our own steps make it, or `generate`.
        """
        self.job, self.input_ids, self.config, self.size, self.by_steps = job, input_ids, config, size, by_steps
        self.abandoned = False
        self.finished = False
        self._emit = emit
        self._stops = StopTexts(job.options.stop)
        self._detokenizer: Detokenizer | None = None
        self._count = 0

    @property
    def beams(self) -> int:
        return int(self.config.num_beams or 1)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values it may come to hold, in all its beams."""
        return self.beams * self.size.total

    @property
    def prompt_kv_tokens(self) -> int:
        """Those of one row before the first step."""
        return self.size.total - int(self.config.max_new_tokens)

    @property
    def late(self) -> bool:
        return self.job.deadline is not None and time.monotonic() >= self.job.deadline

    def fail(self, error: ServeAppError) -> None:
        """The answer ends with this error, unless it has ended."""
        if not self.finished:
            self.finished = True
            self._emit(self, error)

    def take(self, choice: Choice, decoder: Decoder, special: frozenset[int], end: FinishReason | None) -> None:
        """One token more; `end` if it is the last one. `finished` is set where that or a stop text ends the answer."""
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(decoder)
        cut = self._stops.push(self._detokenizer.push(choice.token))
        text, reason = cut.text, end
        if cut.stopped:
            reason = "stop"
        elif end is not None:
            last = self._stops.push(self._detokenizer.finish())
            text += last.text if last.stopped else last.text + self._stops.finish()
            reason = "stop" if last.stopped else end
        self.finished = reason is not None
        self._emit(
            self,
            GeneratedPiece(
                text=text,
                token=choice.token,
                special=choice.token in special,
                logprob=choice.logprob,
                finish_reason=reason,
                prompt_tokens=len(self.job.input_ids),
            ),
        )

    def take_all(self, tokens: Sequence[int], decoder: Decoder, special: frozenset[int], ends: Collection[int]) -> None:
        """The answer's tokens, up to a stop text; `ends` are those that end an answer. Beams can come to none."""
        if not tokens:
            self.finished = True
            self._emit(self, GeneratedPiece("", finish_reason="stop", prompt_tokens=len(self.job.input_ids)))
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            reason: FinishReason | None = None if not last else "stop" if token in ends else "length"
            self.take(Choice(token), decoder, special, reason)
            if self.finished:
                return


def gone(answering: Answering) -> bool:
    """Whether nobody waits for this answer; one that is late is told so."""
    if answering.late:
        answering.fail(DeadlineExceededError("the request's time ran out while its answer was being generated"))
    return answering.abandoned or answering.finished


def failure(error: Exception) -> ServeAppError:
    """What an answer ends with where computing it raised `error`."""
    if isinstance(error, ServeAppError):
        return error
    if is_device_broken(error):
        return UnavailableError("the device failed while it made this answer", retry_after_s=1.0)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return OverloadedError("this replica ran out of memory; try again later", retry_after_s=1.0)
    return ModelFailureError(f"the model failed: {type(error).__name__}: {error}"[:300])

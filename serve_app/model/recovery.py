"""What happens when a forward fails: only the offender pays.

Out of memory: split by tokens, retry in order, and compute less at a time until memory has held for a while.
Broken device: nothing computed here can be trusted again; the replica must be replaced.
Anything else: bisect until the input that fails stands alone. Rows that are not finite fail alone.
Nothing works any more: a probe that has worked before tells whether that is the inputs' fault or the replica's.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from serve_app.errors import InputTooLongError, ModelFailureError, ServeAppError, UnavailableError
from serve_app.model.rows import SequenceRows, failed, stack
from serve_app.types import HeadArguments, TokenBatch

logger = logging.getLogger(__name__)

T = TypeVar("T")

Collect = Callable[[], SequenceRows]
"""Waits for a launched forward: the rows of its n sequences. Raises what the forward raises."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward pass computes: sequences, and what the head needs to know of each, () where it needs nothing."""

    tokens: TokenBatch
    arguments: tuple[HeadArguments | None, ...] = ()

    def select(self, first: int, last: int) -> Work:
        return Work(self.tokens.select(first, last), self.arguments[first:last])


Launch = Callable[[Work], Collect]
"""Starts a forward on the device. A CPU computes it here and has nothing left to wait for."""


class DeviceBrokenError(Exception):
    """The device's context is corrupt (a sticky CUDA error): every later call would fail too."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rows of n sequences; what those in `failures` (by sequence) have means nothing."""

    rows: SequenceRows
    failures: Mapping[int, ServeAppError]


class TokenBudget:
    """How many tokens to compute at a time: the configured bound, less after running out of memory.

    Shrinks to three quarters of what just failed and grows back by a sixteenth of the bound after every 64 batches
    without such a failure, never below `floor` (the longest input that must stay possible).
    """

    RECOVER_AFTER = 64

    def __init__(self, bound: int, floor: int) -> None:
        self._bound, self._floor = bound, min(floor, bound)
        self._current, self._calm = bound, 0

    @property
    def current(self) -> int:
        return self._current

    def rebound(self, bound: int) -> None:
        """The configured bound changed; what was learned below it is kept."""
        lowered = self._current < self._bound
        self._bound, self._floor = bound, min(self._floor, bound)
        self._current = min(self._current, bound) if lowered else bound

    def ran_out(self, tokens: int) -> None:
        self._current = max(self._floor, min(self._current, tokens * 3 // 4))
        self._calm = 0

    def held(self) -> None:
        self._calm += 1
        if self._calm >= self.RECOVER_AFTER and self._current < self._bound:
            self._current = min(self._bound, self._current + max(1, self._bound // 16))
            self._calm = 0


class Breaker:
    """Tells inputs that fail from a replica that fails, and ends the search for the one input that is at fault.

    When every input of some batches in a row has failed, a probe is computed that worked when the replica started. If
    it works, the inputs were at fault, and the next probe comes after twice as many such batches, so that a client who
    sends nothing else costs little. If it fails, the breaker is open: batches that fail are not split any more, and
    `check` raises once the probe has failed several times in a row. A batch or probe that works closes it.

    All but `check` and `is_open` belong to the device thread.
    """

    SUSPECT_AFTER, MOST_PATIENCE = 2, 64
    """Batches in a row of which every input failed, before the first probe, and at most before a further one."""

    GIVE_UP_AFTER = 3
    """Probes that failed in a row."""

    def __init__(self, probe: Callable[[], object] = lambda: None) -> None:
        """`probe` raises what a forward raises."""
        self._probe = probe
        self._failed_batches, self._patience = 0, self.SUSPECT_AFTER
        self._failed_probes, self._error = 0, ""

    @property
    def is_open(self) -> bool:
        return self._failed_probes > 0

    def check(self) -> None:
        """Raise UnavailableError if the replica must be replaced, since nothing works any more."""
        if self._failed_probes >= self.GIVE_UP_AFTER:
            raise self.refusal()

    def refusal(self) -> UnavailableError:
        """What requests are told while the breaker is open: another replica may answer them."""
        return UnavailableError(f"the model of this replica fails for any input ({self._error})", retry_after_s=1.0)

    def worked(self) -> None:
        """An input of a batch was computed."""
        self._failed_batches, self._patience = 0, self.SUSPECT_AFTER
        self._close()

    def failed(self) -> bool:
        """Every input of a batch has failed. Returns whether the probe fails, too."""
        self._failed_batches += 1
        if self._failed_batches >= self._patience:
            self.probe()
        return self.is_open

    def probe(self) -> None:
        """Find out whether the replica works. Raises DeviceBrokenError."""
        worked, error = _attempt(lambda: (self._probe(), True)[1])
        if worked:
            self._failed_batches, self._patience = 0, min(2 * self._patience, self.MOST_PATIENCE)
            self._close()
            return
        self._failed_probes, self._error = self._failed_probes + 1, error
        logger.error("every input fails, and so does the probe, for the %d. time: %s", self._failed_probes, error)

    def _close(self) -> None:
        if self.is_open:
            logger.warning("the model computes again")
        self._failed_probes = 0


@dataclass(frozen=True, slots=True)
class Started:
    """A forward under way, or (`collect` is None) why it could not be launched."""

    work: Work
    collect: Collect | None
    error: str = ""


class Recovery:
    """Runs batches on the device, and failures through the ladder above."""

    def __init__(self, launch: Launch, budget: TokenBudget, breaker: Breaker) -> None:
        self._launch = launch
        self._budget = budget
        self._breaker = breaker
        self.out_of_memory = 0
        self.non_finite_rows = 0

    def run(self, work: Work) -> Outcome:
        """`start` and `finish` in one."""
        return self.finish(self.start(work))

    def start(self, work: Work) -> Started:
        """Launch a forward. Raises DeviceBrokenError; every other failure waits in what is returned."""
        collect, error = _attempt(lambda: self._launch(work))
        return Started(work, collect, error)

    def finish(self, started: Started) -> Outcome:
        """Wait for the rows; after a failure, compute again in parts.

        Raises DeviceBrokenError; every other failure is in the outcome, with the sequence it belongs to.
        """
        split = not self._breaker.is_open
        outcome = self._compute(started, split)
        sequences = started.work.tokens.num_sequences
        if len(outcome.failures) < sequences:
            self._breaker.worked()
        elif self._breaker.failed():
            return Outcome(failed(sequences), dict.fromkeys(range(sequences), self._breaker.refusal()))
        elif not split:  # the probe works again, so this may have been the fault of some of the inputs
            return self._compute(self.start(started.work), split=True)
        return outcome

    def _compute(self, started: Started, split: bool) -> Outcome:
        batch, rows, error = started.work.tokens, None, started.error
        if started.collect is not None:
            rows, error = _attempt(started.collect)
        if rows is not None:
            self._budget.held()
            return self._without_non_finite(rows)
        # Outside of any `except` block: a traceback in flight would keep the failed pass's tensors alive.
        if _is_out_of_memory(error):
            self.out_of_memory += 1
            self._budget.ran_out(int(batch.cu_seqlens[-1]))
            _free_cached_memory()
        if batch.num_sequences > 1 and split:
            return self._halves(started.work)
        sequences = batch.num_sequences
        return Outcome(failed(sequences), dict.fromkeys(range(sequences), _as_answer(error, batch)))

    def _halves(self, work: Work) -> Outcome:
        cut = halfway(work.tokens)
        first = self._compute(self.start(work.select(0, cut)), split=True)
        second = self._compute(self.start(work.select(cut, work.tokens.num_sequences)), split=True)
        failures = {**first.failures, **{cut + i: error for i, error in second.failures.items()}}
        return Outcome(stack([first.rows, second.rows]), failures)

    def _without_non_finite(self, rows: SequenceRows) -> Outcome:
        bad = np.flatnonzero(~np.isfinite(rows.values).all(axis=1))
        if not bad.size:
            return Outcome(rows, {})
        self.non_finite_rows += bad.size
        error = ModelFailureError("the model's output for an input is not finite (NaN or infinity); try float32")
        return Outcome(rows, {rows.of_row(int(row)): error for row in bad})


def _attempt(step: Callable[[], T]) -> tuple[T | None, str]:
    """The step's result, or None and what went wrong."""
    try:
        return step(), ""
    except Exception as error:
        if is_device_broken(error):
            raise DeviceBrokenError(str(error).split("\n")[0]) from error
        return None, _describe(error)


def halfway(batch: TokenBatch) -> int:
    """Index of the sequence that starts nearest to half of the tokens, with at least one on either side."""
    cut = int(np.searchsorted(batch.cu_seqlens, batch.cu_seqlens[-1] / 2))
    return min(max(cut, 1), batch.num_sequences - 1)


_SURVIVED = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "invalid configuration argument")
"""Errors of CUDA that refuse one call, on the device or the host, and leave the context as it is."""


def is_device_broken(error: BaseException) -> bool:
    """Whether this is a sticky CUDA error, after which every call fails until the process has ended."""
    import torch  # here, so that who builds an application, and computes nothing, need not load it

    if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _SURVIVED):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


_OUT_OF_MEMORY = "out of memory"


def _describe(error: Exception) -> str:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return _OUT_OF_MEMORY
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _is_out_of_memory(description: str) -> bool:
    return description == _OUT_OF_MEMORY


def _as_answer(description: str, batch: TokenBatch) -> ServeAppError:
    tokens = int(batch.cu_seqlens[-1])
    if _is_out_of_memory(description):
        return InputTooLongError(f"an input of {tokens} tokens does not fit this replica's memory; shorten it")
    return ModelFailureError(f"the model failed for an input of {tokens} tokens ({description})")


def _free_cached_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""The queue and the device thread: sequences join and leave one batch at every step.

drop ........ what was given up or is late
admit ....... the oldest that fit into the memory for keys and values
prefill ..... a bounded number of prompt tokens, so that those who decode do not wait for a long prompt
step ........ one token for everybody
deliver ..... pieces to the event loop, one wake-up a turn
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import torch

from serve_app.errors import (
    InputTooLongError,
    InvalidInputError,
    OverloadedError,
    RequestError,
    ServeAppError,
    UnavailableError,
)
from serve_app.model.generation.answering import Answering, Item, Size, failure, gone
from serve_app.model.generation.decoding import Decoding, Prefill
from serve_app.model.generation.job import GenerationJob
from serve_app.model.generation.languages import in_language, set_target
from serve_app.model.generation.sampling import Sampler, generation_config
from serve_app.model.generation.text import Decoder
from serve_app.model.generation.whole import WholeAnswers
from serve_app.model.recovery import is_device_broken
from serve_app.model.speed import Speed
from serve_app.model.watchdog import Watchdog
from serve_app.outputs import FinishReason, GeneratedPiece

logger = logging.getLogger(__name__)

IDLE_AFTER_S = 1.0

GIVE_UP_AFTER = 3
"""Steps that failed one after the other, after which the replica must be replaced."""


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """`max_kv_tokens` counts rows times the longest row, of the decoder and of what was encoded together."""

    max_kv_tokens: int
    max_sequences: int = 64
    max_queued_tokens: int = 262_144
    prefill_tokens: int = 512
    """Prompt tokens that go through the model between two steps."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One turn, for metrics."""

    sequences: int
    prefilled_tokens: int
    step_s: float
    queued_tokens: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One admitted answer. `newest` is the token that the next step puts in."""

    answering: Answering
    sampler: Sampler
    prefill: Prefill
    newest: int = 0
    count: int = 0


class StepEngine:
    """Implements `Generator`. `generate` belongs to one event loop; `close` may come from any thread."""

    def __init__(
        self,
        decoding: Decoding,
        decoder: Decoder,
        limits: GenerationLimits,
        window: int | None,
        *,
        special: frozenset[int] = frozenset(),
        computing: Callable[[], Any] = torch.inference_mode,
        prepare_thread: Callable[[], Any] = lambda: None,
        observe: Callable[[StepReport], None] = lambda report: None,
        on_broken: Callable[[], None] = lambda: None,
        on_idle: Callable[[], Any] = lambda: None,
        watchdog: Watchdog | None = None,
        by_steps: bool = True,
    ) -> None:
        """`window` is how many positions the decoder has, None for no end. `computing` wraps all use of the model.

        `on_idle` is called on the device thread whenever nothing was to be computed for a second.
        `by_steps` False sends every job to `generate`, for models that cannot be batched by steps.
        """
        self._decoding, self._decoder, self._special, self._window = decoding, decoder, special, window
        self._computing, self._prepare_thread = computing, prepare_thread
        self._observe, self._on_broken, self._on_idle = observe, on_broken, on_idle
        self._watchdog = watchdog or Watchdog()
        self._by_steps = by_steps
        self.limits = limits
        self._waiting: dict[str, deque[Answering]] = {"interactive": deque(), "bulk": deque()}
        self._filling: deque[Sequence] = deque()
        self._rows: list[Sequence] = []
        self._failed_steps = 0
        self._changed = threading.Condition()
        self._speed = Speed()
        self._closed = False
        self._broken: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pieces: dict[Answering, asyncio.Queue[Item]] = {}
        self._outbox: list[tuple[Answering, Item]] = []
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._whole = WholeAnswers(
            decoding, decoder, special, computing, prepare_thread, lambda: self.limits, self._break
        )

    # --- the event loop's side

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._whole.close()
        if self._thread.is_alive() and not self._watchdog.hangs and threading.current_thread() is not self._thread:
            self._thread.join()

    def check(self) -> None:
        """Raise UnavailableError if nothing can be generated; where a step hangs, all answers under way end with it."""
        if self._broken is not None:
            raise UnavailableError(f"this replica cannot generate any more: {self._broken}", retry_after_s=1.0)
        if self._closed or (self._thread.ident is not None and not self._thread.is_alive()):
            raise UnavailableError("this replica is ending", retry_after_s=1.0)
        try:
            self._watchdog.check()
        except UnavailableError as error:
            for answering, pieces in self._pieces.items():
                answering.abandoned = True
                pieces.put_nowait(error)
            raise

    @property
    def active(self) -> int:
        """Sequences that are made by steps and hold memory for keys and values, or are about to."""
        return len(self._rows) + len(self._filling)

    @property
    def queued_tokens(self) -> int:
        return sum(len(a.job.input_ids) for queue in self._waiting.values() for a in list(queue))

    async def generate(self, job: GenerationJob) -> AsyncIterator[GeneratedPiece]:
        async with aclosing(self.generate_lists(job)) as lists:
            async for pieces in lists:
                for piece in pieces:
                    yield piece

    async def generate_lists(self, job: GenerationJob) -> AsyncGenerator[list[GeneratedPiece], None]:
        """As `generate`, with all pieces at once that are there whenever the caller is ready for more."""
        self.check()
        answering = self._checked(job)
        pieces: asyncio.Queue[Item] = asyncio.Queue()  # bounded by the answer's own limit of tokens
        self._pieces[answering] = pieces
        try:
            submit = self._submit if self._can_step(answering.config) else self._whole.submit
            submit(answering)
            last = False
            while not last:
                taken, error = _taken(await pieces.get(), pieces)
                if taken:
                    yield taken
                if error is not None:
                    raise error
                last = taken[-1].finish_reason is not None
        finally:
            answering.abandoned = True
            del self._pieces[answering]

    def _checked(self, job: GenerationJob) -> Answering:
        """Raises RequestError for what can never be answered."""
        prompt = len(job.input_ids)
        if not prompt:
            raise InvalidInputError("inputs: a prompt has at least one token")
        size = Size(1, prompt) if self._decoding.encodes else Size(prompt, 0)
        config = generation_config(self._decoding.model, job.options, size.own)
        config.max_new_tokens = self._bounded(prompt, int(config.max_new_tokens))
        if _beams(config) > 1 and job.options.logprobs is not None:
            raise InvalidInputError("logprobs, details of tokens: are not given with beams; set num_beams to 1")
        size = replace(size, own=size.own + config.max_new_tokens)
        if _beams(config) * size.total > self.limits.max_kv_tokens:
            raise InputTooLongError(
                f"the prompt's {prompt} tokens and {config.max_new_tokens} new ones need more memory than the "
                f"{self.limits.max_kv_tokens} tokens this replica has; shorten the prompt or lower max_new_tokens"
            )
        ids = in_language(job.input_ids, job.options, self._decoder, self._special, _plain(config))
        self._decoding.check_ids(ids)
        set_target(config, job.options, self._decoder)
        return Answering(job, ids, config, size, self._post if self._can_step(config) else self._post_now)

    def _can_step(self, config: Any) -> bool:
        """Whether our own steps can make this answer; otherwise `generate` does, alone."""
        return self._by_steps and _beams(config) == 1

    def _bounded(self, prompt: int, new: int) -> int:
        """New tokens for which the window has positions. Raises InputTooLongError if it has none."""
        if self._window is None:
            return new
        room = self._window - (1 if self._decoding.encodes else prompt)
        if room < 1:
            raise InputTooLongError(f"inputs: {prompt} tokens fill the window of {self._window}; an answer needs room")
        return min(new, room)

    def _submit(self, answering: Answering) -> None:
        with self._changed:
            if self.queued_tokens + len(answering.job.input_ids) > self.limits.max_queued_tokens:
                raise OverloadedError("this replica's queue is full; try again later", retry_after_s=self._wait_s())
            self._waiting[answering.job.priority].append(answering)
            self._changed.notify()

    def _wait_s(self) -> float:
        """Seconds until half of those that wait are answered."""
        waiting = [answering for queue in self._waiting.values() for answering in queue]
        return self._speed.wait_s(sum(answering.size.total for answering in waiting) / 2)

    # --- the device thread's side

    def _serve(self) -> None:
        try:
            self._prepare_thread()
            with self._computing():
                while self._wait():
                    with self._watchdog.computing():
                        self._turn()
        except Exception as error:
            self._break(error)
        finally:
            self._end_all(UnavailableError("the replica that computed this answer is ending", retry_after_s=1.0))

    def _break(self, error: Exception) -> None:
        """This replica must be replaced. Any thread that uses the device may find that out."""
        logger.critical("the device has failed, this replica must be replaced", exc_info=error)
        self._broken = f"{type(error).__name__}: {error}"
        self._on_broken()

    def _wait(self) -> bool:
        """Until there is work, or there was none for a second; False when closed."""
        with self._changed:
            wanted = self._closed or self.active or any(self._waiting.values())
            idle = not wanted and not self._changed.wait(IDLE_AFTER_S)
        if idle and not self._whole.active:
            self._on_idle()
        return not self._closed

    def _turn(self) -> None:
        started = time.monotonic()
        self._drop()
        self._admit()
        prefilled = self._prefill()
        stepped = len(self._rows)
        if stepped:
            self._step()
        self._deliver()
        if stepped or prefilled:
            took_s = time.monotonic() - started
            self._speed.add(stepped + prefilled, took_s)
            self._observe(StepReport(stepped, prefilled, took_s, self.queued_tokens))

    def _drop(self) -> None:
        """Take out what was given up or is late: waiting, filling or decoding."""
        with self._changed:
            for name, queue in self._waiting.items():
                self._waiting[name] = deque(a for a in queue if not gone(a))
        self._filling = deque(s for s in self._filling if not gone(s.answering))
        for row in reversed(range(len(self._rows))):
            if gone(self._rows[row].answering):
                self._leave(row)

    def _leave(self, row: int) -> None:
        self._decoding.leave(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def _admit(self) -> None:
        while (answering := self._first_waiting()) is not None and self._fits(answering.size):
            with self._changed:
                self._waiting[answering.job.priority].popleft()
            try:
                self._filling.append(self._begin(answering))
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.warning("an answer could not be begun", exc_info=True)
                _end_with(answering, error)

    def _first_waiting(self) -> Answering | None:
        if self.active >= self.limits.max_sequences:
            return None
        with self._changed:
            return next((queue[0] for queue in self._waiting.values() if queue), None)

    def _fits(self, size: Size) -> bool:
        sizes = [*(s.answering.size for s in (*self._rows, *self._filling)), size]
        longest = max(s.own for s in sizes) + max(s.encoded for s in sizes)
        return len(sizes) == 1 or len(sizes) * longest <= self.limits.max_kv_tokens

    def _begin(self, answering: Answering) -> Sequence:
        config, decoding = answering.config, self._decoding
        start = decoding.start_token(config) if decoding.encodes else None
        prefill = decoding.begin(answering.input_ids, start)
        sampler = Sampler(decoding.model, config, answering.job.options, prefill.prompt, prefill.encoder_ids)
        return Sequence(answering, sampler, prefill)

    def _prefill(self) -> int:
        """Prompts, oldest first, until the budget of tokens is used; a prompt that fails fails alone."""
        used = 0
        while self._filling and used < self.limits.prefill_tokens:
            sequence = self._filling[0]
            try:
                used += self._decoding.prefill(sequence.prefill, self.limits.prefill_tokens - used)
                if sequence.prefill.logits is None:
                    continue
                self._filling.popleft()
                self._choose(sequence, sequence.prefill.logits)
                if not sequence.answering.finished:
                    self._join(sequence)
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.warning("a prompt of %d tokens failed", len(sequence.answering.job.input_ids), exc_info=True)
                if self._filling and self._filling[0] is sequence:
                    self._filling.popleft()
                _end_with(sequence.answering, error)
        return used

    def _join(self, sequence: Sequence) -> None:
        self._decoding.join(sequence.prefill)
        self._rows.append(sequence)

    def _step(self) -> None:
        try:
            logits = self._decoding.step([sequence.newest for sequence in self._rows])
        except Exception as error:
            self._fail_step(error)
            return
        self._failed_steps = 0
        for sequence, mine in zip(self._rows, logits, strict=True):
            self._try_choosing(sequence, mine)
        for row in reversed(range(len(self._rows))):
            if self._rows[row].answering.finished:
                self._leave(row)

    def _fail_step(self, error: Exception) -> None:
        """Nobody's keys and values can be trusted after a step that failed half-way: all who took part fail."""
        logger.error("a step of %d sequences failed", len(self._rows), exc_info=error)
        for sequence in self._rows:
            sequence.answering.fail(failure(error))
        self._rows.clear()
        self._decoding.clear()
        self._failed_steps += 1
        if self._failed_steps >= GIVE_UP_AFTER or is_device_broken(error):
            raise error

    def _try_choosing(self, sequence: Sequence, logits: Any) -> None:
        try:
            self._choose(sequence, logits)
        except Exception as error:
            _end_with(sequence.answering, error)

    def _choose(self, sequence: Sequence, logits: Any) -> None:
        choice = sequence.sampler.choose(logits, self._decoder)
        sequence.newest, sequence.count = choice.token, sequence.count + 1
        end: FinishReason | None = None
        if choice.token in sequence.sampler.ends:
            end = "stop"
        elif sequence.count >= sequence.sampler.limit:
            end = "length"
        sequence.answering.take(choice, self._decoder, self._special, end)

    def _end_all(self, error: ServeAppError) -> None:
        with self._changed:
            self._closed = True
            waiting = [a for queue in self._waiting.values() for a in queue]
            for queue in self._waiting.values():
                queue.clear()
        for answering in [*waiting, *(s.answering for s in (*self._rows, *self._filling))]:
            answering.fail(error)
        self._rows.clear()
        self._filling.clear()
        self._deliver()

    # --- between the two

    def _post(self, answering: Answering, item: Item) -> None:
        self._outbox.append((answering, item))

    def _post_now(self, answering: Answering, item: Item) -> None:
        self._hand_over([(answering, item)])

    def _deliver(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox:
            self._hand_over(outbox)

    def _hand_over(self, items: list[tuple[Answering, Item]]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._receive, items)

    def _receive(self, items: list[tuple[Answering, Item]]) -> None:
        for answering, item in items:
            pieces = self._pieces.get(answering)
            if pieces is not None:
                pieces.put_nowait(item)


def _taken(first: Item, pieces: asyncio.Queue[Item]) -> tuple[list[GeneratedPiece], ServeAppError | None]:
    """All that is there, up to an error."""
    taken: list[GeneratedPiece] = []
    item = first
    while not isinstance(item, ServeAppError):
        taken.append(item)
        if pieces.empty():
            return taken, None
        item = pieces.get_nowait()
    return taken, item


def _beams(config: Any) -> int:
    return int(config.num_beams or 1)


def _plain(config: Any) -> frozenset[int]:
    """Special tokens that mean no language."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return frozenset(i for i in (*ends, config.pad_token_id, config.bos_token_id) if i is not None)


def _end_with(answering: Answering, error: Exception) -> None:
    """The answer ends with the error. Raises it again where the device is lost, which ends the replica."""
    answering.fail(failure(error))
    if is_device_broken(error):
        raise error

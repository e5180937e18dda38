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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Hashable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from serve_app.errors import (
    InputTooLongError,
    InvalidInputError,
    OverloadedError,
    RequestError,
    ServeAppError,
    UnavailableError,
)
from serve_app.model.generation.answering import Answering, Item, Size, failure, gone
from serve_app.model.generation.beams import Advance, BeamSearch, advance, reordered
from serve_app.model.generation.budget import Extent
from serve_app.model.generation.decoding import Decoding, Prefill, Probe
from serve_app.model.generation.job import GenerationJob
from serve_app.model.generation.languages import in_language, set_target
from serve_app.model.generation.sampling import Rules, Sampler, generation_config, rules_of, set_ends
from serve_app.model.generation.text import Decoder
from serve_app.model.generation.whole import MOST_AT_ONCE, WholeAnswers
from serve_app.model.recovery import Breaker, is_device_broken
from serve_app.model.speed import Speed
from serve_app.model.watchdog import Watchdog
from serve_app.outputs import FinishReason, GeneratedPiece
from serve_app.types import BULK_EVERY

logger = logging.getLogger(__name__)

IDLE_AFTER_S = 1.0
"""So often those that wait are looked through for answers that are late, where nothing else happens."""

LOGITS_AT_ONCE = 1 << 22
"""Of rows of beams that are looked through together, which takes some 12 bytes of memory each."""

BEAMS_BY_STEPS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """`max_kv_tokens` counts the tokens for whose keys and values memory is held: rows times columns of the tensors.

    Those of prompts on their way, and what answers by `generate` may come to, are counted with them. `max_sequences`
    are answers, each with all its beams.
    """

    max_kv_tokens: int
    max_sequences: int = 64
    max_queued_tokens: int = 262_144
    prefill_tokens: int = 512
    """Prompt tokens that go through the model between two steps."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One turn, for metrics."""

    sequences: int
    rows: int
    """Sequences times their beams."""
    prefilled_tokens: int
    step_s: float
    queued_tokens: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One admitted answer. Of its beams, or of the one row that it has without: where they are, and what comes next."""

    answering: Answering
    rules: Rules
    chooser: Sampler | BeamSearch
    prefill: Prefill | None
    """Until it has joined."""
    rows: list[int] = field(default_factory=list)
    newest: list[int] = field(default_factory=list)
    """The tokens that the next step puts in."""
    parents: list[int] | None = None
    """The beams that those go on from, where rows have yet to be copied."""
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
        self._admitted = 0
        self._filling: deque[Sequence] = deque()
        self._sequences: list[Sequence] = []
        self._owners: list[Sequence] = []
        """Of each row."""
        self._breaker = Breaker(Probe(decoding.model, decoding.device))
        self._changed = threading.Condition()
        self._speed = Speed()
        self._closed = False
        self._broken: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pieces: dict[Answering, asyncio.Queue[Item]] = {}
        self._outbox: list[tuple[Answering, Item]] = []
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._whole = WholeAnswers(
            decoding,
            decoder,
            special,
            computing,
            prepare_thread,
            self._whole_ended,
            self._break,
            self._watchdog.computing,
        )

    # --- the event loop's side

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._whole.close(wait=not self._watchdog.hangs)
        if self._thread.is_alive() and not self._watchdog.hangs and threading.current_thread() is not self._thread:
            self._thread.join()

    def check(self) -> None:
        """Raise UnavailableError if nothing can be generated; where a step hangs, all answers under way end with it."""
        if self._broken is not None:
            raise UnavailableError(f"this replica cannot generate any more: {self._broken}", retry_after_s=1.0)
        if self._closed or (self._thread.ident is not None and not self._thread.is_alive()):
            raise UnavailableError("this replica is ending", retry_after_s=1.0)
        self._breaker.check()
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
        return len(self._sequences) + len(self._filling)

    @property
    def held_tokens(self) -> int:
        """Tokens for whose keys and values memory is held, or promised to `generate`."""
        filling = sum(s.prefill.tokens for s in self._filling if s.prefill is not None)
        return self._decoding.tokens + filling + self._whole.tokens

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
            self._submit(answering)
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
            with self._changed:
                self._changed.notify()  # a place in the queue may be free

    def _checked(self, job: GenerationJob) -> Answering:
        """Raises RequestError for what can never be answered."""
        prompt = len(job.input_ids)
        if not prompt:
            raise InvalidInputError("inputs: a prompt has at least one token")
        size = Size(1, prompt) if self._decoding.encodes else Size(prompt, 0)
        config = generation_config(self._decoding.model, job.options, size.own)
        config.max_new_tokens = self._bounded(prompt, int(config.max_new_tokens))
        beams = int(config.num_beams or 1)
        if beams > 1 and job.options.logprobs is not None:
            raise InvalidInputError("logprobs, details of tokens: are not given with beams; set num_beams to 1")
        size = replace(size, own=size.own + config.max_new_tokens)
        if beams * size.total > self.limits.max_kv_tokens:
            times = f", {beams} times for its beams," if beams > 1 else ""
            raise InputTooLongError(
                f"the prompt's {prompt} tokens and {config.max_new_tokens} new ones{times} need more memory than the "
                f"{self.limits.max_kv_tokens} tokens this replica has; shorten the prompt or lower max_new_tokens"
            )
        ids = in_language(job.input_ids, job.options, self._decoder, self._special, _plain(config))
        self._decoding.check_ids(ids)
        set_target(config, job.options, self._decoder)
        set_ends(config, job.options, self._decoder, self._special)
        by_steps = self._can_step(config)
        return Answering(job, ids, config, size, by_steps, self._post if by_steps else self._post_now)

    def _can_step(self, config: Any) -> bool:
        """Whether our own steps can make this answer; otherwise `generate` does, alone."""
        if not self._by_steps or config.max_time is not None:
            return False
        if int(config.num_beams or 1) == 1:
            return True
        return config.get_generation_mode() in BEAMS_BY_STEPS and not hasattr(self._decoding.model, "_reorder_cache")

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
            queued = self.queued_tokens  # an empty queue takes whatever a replica can answer
            if queued and queued + len(answering.job.input_ids) > self.limits.max_queued_tokens:
                raise OverloadedError("this replica's queue is full; try again later", retry_after_s=self._wait_s())
            self._waiting[answering.job.priority].append(answering)
            self._changed.notify()

    def _wait_s(self) -> float:
        """Seconds until half of those that wait are answered."""
        waiting = [answering for queue in self._waiting.values() for answering in queue]
        return self._speed.wait_s(sum(answering.kv_tokens for answering in waiting) / 2)

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
        """Until something can be done, or there was nothing for a second; False when closed."""
        with self._changed:
            wanted = self._closed or self.active or self._next() is not None
            idle = not wanted and not self._changed.wait(IDLE_AFTER_S)
        if idle and not self._whole.active:
            self._on_idle()
        return not self._closed

    def _turn(self) -> None:
        started = time.monotonic()
        self._drop()
        self._admit()
        prefilled = self._prefill()
        sequences, rows = len(self._sequences), len(self._owners)
        if rows:
            self._step()
        self._deliver()
        if rows or prefilled:
            took_s = time.monotonic() - started
            self._count(rows + prefilled, took_s)
            self._observe(StepReport(sequences, rows, prefilled, took_s, self.queued_tokens))

    def _count(self, tokens: int, took_s: float) -> None:
        with self._changed:
            self._speed.add(tokens, took_s)

    def _drop(self) -> None:
        """Take out what was given up or is late: waiting, filling or decoding."""
        with self._changed:
            for name, queue in self._waiting.items():
                self._waiting[name] = deque(a for a in queue if not gone(a))
        self._filling = deque(s for s in self._filling if not gone(s.answering))
        for sequence in [s for s in self._sequences if gone(s.answering)]:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        for row in sorted(sequence.rows, reverse=True):
            self._decoding.leave(row)
            last, owner = len(self._owners) - 1, self._owners.pop()
            if row != last:
                self._owners[row] = owner
                owner.rows[owner.rows.index(last)] = row

    def _admit(self) -> None:
        while (answering := self._next()) is not None:
            with self._changed:
                self._waiting[answering.job.priority].popleft()
            self._admitted += 1
            try:
                self._make_way(answering)
                if answering.by_steps:
                    self._filling.append(self._begin(answering))
                else:
                    self._whole.begin(answering)
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.warning("an answer could not be begun", exc_info=True)
                self._end_with(answering, error)
                self._suspect(error)

    def _next(self) -> Answering | None:
        """The oldest that waits, if there is room for it; of bulk answers one in four, while others wait."""
        with self._changed:
            interactive, bulk = self._waiting["interactive"], self._waiting["bulk"]
            is_turn_of_bulk = bulk and (not interactive or self._admitted % BULK_EVERY == BULK_EVERY - 1)
            queue = bulk if is_turn_of_bulk else interactive
            first = queue[0] if queue else None
        if first is None or self.active + self._whole.active >= self.limits.max_sequences:
            return None
        if not first.by_steps and self._whole.active >= MOST_AT_ONCE:
            return None
        return first if self._fits(first) else None

    def _fits(self, answering: Answering) -> bool:
        """Whether it and all that are under way have room until their ends. One alone was checked when it came."""
        if not self.active and not self._whole.active:
            return True
        stepped, promised = self._with(answering)
        return Extent.of(stepped).tokens + promised <= self.limits.max_kv_tokens

    def _with(self, answering: Answering) -> tuple[list[Answering], int]:
        """What is made by steps, and the tokens that answers by `generate` may come to, this one among them."""
        stepped = [s.answering for s in (*self._sequences, *self._filling)]
        if answering.by_steps:
            return [*stepped, answering], self._whole.tokens
        return stepped, self._whole.tokens + answering.kv_tokens

    def _make_way(self, answering: Answering) -> None:
        """See that tensors hold no more than leaves room for this answer, now and when they are made anew."""
        stepped, promised = self._with(answering)
        if not stepped:
            return
        tokens = self.limits.max_kv_tokens - promised
        self._decoding.limit(Extent.of(stepped).room(tokens))
        joined = {sequence.answering for sequence in self._sequences}
        prompt = max((a.prompt_kv_tokens for a in stepped if a not in joined), default=0)  # one is on its way at a time
        if self._decoding.tokens + prompt > tokens:
            self._decoding.compact()

    def _begin(self, answering: Answering) -> Sequence:
        config, decoding = answering.config, self._decoding
        start = decoding.start_token(config) if decoding.encodes else None
        prefill = decoding.begin(answering.input_ids, start)
        rules = rules_of(decoding.model, config, answering.job.options, prefill.prompt, prefill.encoder_ids)
        chooser = (
            Sampler(rules, answering.job.options, prefill.prompt)
            if answering.beams == 1
            else BeamSearch(config, rules, prefill.prompt)
        )
        return Sequence(answering, rules, chooser, prefill)

    def _prefill(self) -> int:
        """Prompts, oldest first, until the budget of tokens is used; a prompt that fails fails alone."""
        used = 0
        while self._filling and used < self.limits.prefill_tokens:
            sequence = self._filling[0]
            prefill = sequence.prefill
            assert prefill is not None
            try:
                used += self._decoding.prefill(prefill, self.limits.prefill_tokens - used)
                if prefill.logits is None:
                    continue
                self._filling.popleft()
                self._choose_first(sequence, prefill.logits)
                if sequence.answering.finished:
                    self._breaker.worked()
                else:
                    self._join(sequence, prefill)
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.warning("a prompt of %d tokens failed", len(sequence.answering.job.input_ids), exc_info=True)
                if self._filling and self._filling[0] is sequence:
                    self._filling.popleft()
                self._end_with(sequence.answering, error)
                self._suspect(error)
        return used

    def _join(self, sequence: Sequence, prefill: Prefill) -> None:
        beams = sequence.answering.beams
        self._decoding.join(prefill, beams)
        sequence.prefill = sequence.parents = None  # beams are equal so far
        sequence.rows = [*range(len(self._owners), len(self._owners) + beams)]
        self._owners += [sequence] * beams
        self._sequences.append(sequence)

    def _step(self) -> None:
        tokens = [0] * len(self._owners)
        for sequence in self._sequences:
            for row, token in zip(sequence.rows, sequence.newest, strict=True):
                tokens[row] = token
        try:
            logits = self._decoding.step(tokens)
        except Exception as error:
            self._fail_step(error)
            return
        advances = self._advances(logits)
        failures = [self._try_choosing(sequence, logits, advances) for sequence in self._sequences]
        if None in failures:
            self._breaker.worked()
        else:
            self._suspect(*failures)
        self._copy_beams()
        for sequence in [s for s in self._sequences if s.answering.finished]:
            self._leave(sequence)

    def _fail_step(self, error: Exception) -> None:
        """Nobody's keys and values can be trusted after a step that failed half-way: all who took part fail."""
        logger.error("a step of %d sequences failed", len(self._sequences), exc_info=error)
        sequences, self._sequences = self._sequences, []
        self._owners.clear()
        self._decoding.clear()
        for sequence in sequences:
            sequence.answering.fail(self._told(error))
        if is_device_broken(error):
            raise error
        self._suspect(error)

    def _suspect(self, *errors: Exception | None) -> None:
        """Nothing went right beside these errors. Raises what tells that the device is lost."""
        if not all(isinstance(error, RequestError) for error in errors):
            self._breaker.failed()

    def _end_with(self, answering: Answering, error: Exception) -> None:
        """The answer ends with the error. Raises it again where the device is lost, which ends the replica."""
        answering.fail(self._told(error))
        if is_device_broken(error):
            raise error

    def _told(self, error: Exception) -> ServeAppError:
        """What the client is told: while everything fails, that another replica may answer."""
        is_own_fault = isinstance(error, RequestError)
        return self._breaker.refusal() if self._breaker.is_open and not is_own_fault else failure(error)

    def _advances(self, logits: Tensor) -> dict[Sequence, Advance | Exception | None]:
        """How the beams of each sequence that has some go on. `logits` (n, v) are of all rows."""
        kinds: dict[Hashable, list[tuple[Sequence, BeamSearch]]] = {}
        for sequence in self._sequences:
            if isinstance(sequence.chooser, BeamSearch):
                kinds.setdefault(sequence.chooser.kind, []).append((sequence, sequence.chooser))
        advances: dict[Sequence, Advance | Exception | None] = {}
        for searching in kinds.values():
            at_once = max(1, LOGITS_AT_ONCE // (searching[0][1].beams * logits.shape[-1]))
            for first in range(0, len(searching), at_once):
                sequences, searches = zip(*searching[first : first + at_once], strict=True)
                advances.update(zip(sequences, _advance(sequences, searches, logits), strict=True))
        return advances

    def _try_choosing(
        self, sequence: Sequence, logits: Tensor, advances: Mapping[Sequence, Advance | Exception | None]
    ) -> Exception | None:
        """What the answer has failed with, if it has. `logits` (n, v) are of all rows."""
        try:
            if isinstance(sequence.chooser, BeamSearch):
                self._go_on(sequence, sequence.chooser, advances[sequence])
            else:
                self._choose(sequence, sequence.chooser, logits[sequence.rows[0]])
        except Exception as error:
            self._end_with(sequence.answering, error)
            return error
        return None

    def _choose_first(self, sequence: Sequence, logits: Tensor) -> None:
        """`logits` (v,) follow the prompt."""
        if isinstance(sequence.chooser, BeamSearch):
            (ahead,) = advance([sequence.chooser], logits.expand(sequence.chooser.beams, -1))
            self._go_on(sequence, sequence.chooser, ahead)
        else:
            self._choose(sequence, sequence.chooser, logits)

    def _choose(self, sequence: Sequence, sampler: Sampler, logits: Tensor) -> None:
        """`logits` (v,) are of the sequence's row."""
        choice = sampler.choose(logits, self._decoder)
        sequence.newest, sequence.count = [choice.token], sequence.count + 1
        end: FinishReason | None = None
        if choice.token in sampler.ends:
            end = "stop"
        elif sequence.count >= sequence.rules.limit:
            end = "length"
        sequence.answering.take(choice, self._decoder, self._special, end)

    def _go_on(self, sequence: Sequence, search: BeamSearch, ahead: Advance | Exception | None) -> None:
        if isinstance(ahead, Exception):
            raise ahead
        if ahead is not None:
            sequence.parents, sequence.newest = ahead.parents, ahead.tokens
            return
        sequence.answering.take_all(search.best(), self._decoder, self._special, search.ends)

    def _copy_beams(self) -> None:
        """Give each beam the keys and values of the one that it goes on from."""
        moving: list[Sequence] = []
        sources: list[int] = []
        targets: list[int] = []
        for sequence in self._sequences:
            if sequence.parents is None or sequence.answering.finished:
                continue
            sequence.rows, copied, overwritten = reordered(sequence.rows, sequence.parents)
            sequence.parents = None
            if copied:
                moving.append(sequence)
                sources += copied
                targets += overwritten
        if not moving:
            return
        try:
            self._decoding.copy(sources, targets)
        except Exception as error:
            logger.warning("the beams of %d answers could not be copied", len(moving), exc_info=True)
            for sequence in moving:
                self._end_with(sequence.answering, error)

    def _end_all(self, error: ServeAppError) -> None:
        with self._changed:
            self._closed = True
            waiting = [a for queue in self._waiting.values() for a in queue]
            for queue in self._waiting.values():
                queue.clear()
        for answering in [*waiting, *(s.answering for s in (*self._sequences, *self._filling))]:
            answering.fail(error)
        self._sequences.clear()
        self._owners.clear()
        self._filling.clear()
        self._decoding.clear()
        self._deliver()

    # --- between the two

    def _whole_ended(self, answering: Answering, took_s: float) -> None:
        """On the thread of an answer by `generate`, which others took turns with."""
        with self._changed:
            self._speed.add(answering.kv_tokens, took_s / (self._whole.active + 1))
            self._changed.notify()

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


def _advance(
    sequences: Collection[Sequence], searches: Collection[BeamSearch], logits: Tensor
) -> list[Advance | Exception | None]:
    """How the searches go on, or what they fail with, each alone. `logits` (n, v) are of all rows."""
    rows = [row for sequence in sequences for row in sequence.rows]
    try:
        return advance([*searches], logits.index_select(0, torch.tensor(rows, device=logits.device)))
    except Exception as error:
        if len(searches) == 1:
            return [error]
    alone = [_advance([sequence], [search], logits) for sequence, search in zip(sequences, searches, strict=True)]
    return [ahead for (ahead,) in alone]


def _plain(config: Any) -> frozenset[int]:
    """Special tokens that mean no language."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return frozenset(i for i in (*ends, config.pad_token_id, config.bos_token_id) if i is not None)

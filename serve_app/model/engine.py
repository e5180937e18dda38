"""One device thread between an event loop and a model: calls in, rows out.

parts = scheduler.take()            # oldest first, within the token budget, when the device is free
outcome = recovery.run(work)        # one forward, or the ladder of failures
scatter(parts, outcome)             # rows to the jobs they belong to, finished jobs to the event loop
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from serve_app.errors import ServeAppError, UnavailableError
from serve_app.model.recovery import Breaker, Collect, DeviceBrokenError, Outcome, Recovery, Started, TokenBudget, Work
from serve_app.model.rows import failed, stack
from serve_app.model.scheduler import Job, Limits, Part, Scheduler, finish
from serve_app.model.watchdog import Watchdog
from serve_app.types import Forget, ForwardCall, HeadArguments, Rows, TokenBatch, concatenate

logger = logging.getLogger(__name__)

HeadLaunch = Callable[[str, Work], Collect]
"""(head, work) -> starts the forward and that head; what is returned waits for its rows."""

T = TypeVar("T")

IDLE_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One forward pass, for metrics."""

    tokens: int
    sequences: int
    forward_s: float
    queued_tokens: int
    out_of_memory: int
    failures: int


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A batch on the device."""

    parts: list[Part]
    recovery: Recovery
    forward: Started
    started: float


@dataclass(eq=False, slots=True)
class _Call:
    """A ForwardCall under way: its event loop's future is resolved when its last job is done."""

    future: asyncio.Future[None]
    jobs: dict[int, Job] = field(default_factory=dict)
    open_jobs: int = 0


class Engine:
    """Owns the queue and the device thread. `submit` belongs to one event loop; `close` may come from any thread."""

    def __init__(
        self,
        launch: HeadLaunch,
        limits: Limits,
        max_input_tokens: int,
        depth: int = 1,
        observe: Callable[[BatchReport], None] = lambda report: None,
        prepare_thread: Callable[[], None] = lambda: None,
        on_broken: Callable[[], None] = lambda: None,
        on_idle: Callable[[], object] = lambda: None,
        on_abandoned: Callable[[int], None] = lambda tokens: None,
        probe: Callable[[], object] = lambda: None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """`depth` is how many batches are on the device at once, 1 or 2.

        On the device thread run: `prepare_thread` first (thread counts, the CUDA device); `on_idle` whenever nothing
        came for a second; `on_broken` when the device's context is corrupt and the process must be replaced; `probe`,
        a forward that works unless the replica is at fault, when every input fails. On the event loop runs
        `on_abandoned`, with the tokens that leave the queue because nobody waits for them any more.
        """
        self._launch = launch
        self._depth = depth
        self._on_idle = on_idle
        self._on_abandoned = on_abandoned
        self._observe = observe
        self._prepare_thread = prepare_thread
        self._on_broken = on_broken
        self._configured = limits
        self._budget = TokenBudget(limits.max_batch_tokens, max_input_tokens)
        self._watchdog = watchdog or Watchdog()
        self._breaker = Breaker(lambda: self._watched(probe))
        self._scheduler = Scheduler(limits)
        self._calls: dict[Job, _Call] = {}
        self._named: dict[str, _Call] = {}
        self._finished: deque[Job] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken: str | None = None
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the device thread; answers are delivered on `loop`."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Fail what waits, let the running forward end unless it hangs, and stop the thread."""
        self._scheduler.close()
        if self._thread.is_alive() and not self._watchdog.hangs and threading.current_thread() is not self._thread:
            self._thread.join()
        self._flush()

    def check(self) -> None:
        """Raise UnavailableError if this engine cannot answer; call it on the event loop.

        Where a forward hangs, what waits for it fails as well, so that another replica can be asked.
        """
        if self._broken is not None:
            raise UnavailableError(f"the device of this replica is broken: {self._broken}", retry_after_s=1.0)
        if self._thread.ident is not None and not self._thread.is_alive():
            raise UnavailableError("the device thread of this replica has ended", retry_after_s=1.0)
        self._breaker.check()
        try:
            self._watchdog.check()
        except UnavailableError as error:
            self._fail_all(error)
            raise

    def set_limits(self, limits: Limits) -> None:
        """Apply new limits from the next batch on."""
        self._configured = limits
        self._budget.rebound(limits.max_batch_tokens)
        self._apply_budget()

    @property
    def max_batch_tokens(self) -> int:
        """The budget in force: the configured one, or less while memory is short."""
        return self._budget.current

    async def submit(self, call: ForwardCall) -> Rows:
        """Compute every request of the call. Failures are per request, in the answer; UnavailableError is raised."""
        self.check()
        indices = np.flatnonzero(np.diff(call.tokens.cu_requests))
        under_way = _Call(asyncio.get_running_loop().create_future(), open_jobs=len(indices))
        for index in indices:
            self._submit_one(call, int(index), under_way)
        if call.id:
            self._named[call.id] = under_way
        try:
            if len(indices):
                await under_way.future
        finally:
            self._named.pop(call.id, None)
            self._abandon(list(under_way.jobs.values()))
        return _rows(call.tokens, under_way)

    def forget(self, forget: Forget) -> bool:
        """Drop what waits of requests that nobody waits for, which then fail in the call's answer.

        Best effort: what runs or is done stays as it is. Returns whether the call is under way here.
        """
        call = self._named.get(forget.call_id)
        if call is None:
            return False
        jobs = [call.jobs[index] for index in forget.requests if index in call.jobs]
        for job in self._abandon(jobs):
            job.error = UnavailableError("nobody waits for this request any more")
            self._close(call)
        return True

    def _abandon(self, jobs: list[Job]) -> list[Job]:
        """Those of the jobs that were not done; now they are, and what of them waited is never computed."""
        open_jobs = [job for job in jobs if self._calls.pop(job, None) is not None]
        tokens = sum(self._scheduler.cancel(job) for job in open_jobs)
        if tokens:
            self._on_abandoned(tokens)
        return open_jobs

    def _fail_all(self, error: UnavailableError) -> None:
        calls = dict(self._calls)
        for job in self._abandon(list(calls)):
            job.error = error
            self._close(calls[job])

    def _submit_one(self, call: ForwardCall, index: int, under_way: _Call) -> None:
        rows = call.tokens.sequences_of(index)
        left_s = call.time_left_s[index]
        job = Job(
            tokens=call.tokens.select(rows.start, rows.stop),
            head=call.head,
            on_done=self._finished.append,
            priority=call.priorities[index] if call.priorities else "interactive",
            deadline=None if left_s is None else time.monotonic() + left_s,
            arguments=call.arguments[index] if call.arguments else None,
            goes_first=call.goes_first,
        )
        under_way.jobs[index] = job
        self._calls[job] = under_way
        try:
            self._scheduler.submit(job)
        except ServeAppError as error:
            job.error, job.done = error, True
            self._deliver([job])

    def _serve(self) -> None:
        self._prepare_thread()
        under_way: deque[_UnderWay] = deque()
        try:
            while (parts := self._scheduler.take(0 if under_way else IDLE_AFTER_S)) is not None or under_way:
                self._step(parts or [], under_way)
        except DeviceBrokenError as error:
            self._broken = str(error)
            logger.critical("the device is broken, this replica must be replaced: %s", error)
            self._on_broken()
        finally:
            for batch in under_way:
                _fail(batch.parts)
            self._scheduler.close(UnavailableError("this replica's device thread has ended", retry_after_s=1.0))
            self._flush()

    def _step(self, parts: list[Part], under_way: deque[_UnderWay]) -> None:
        """Launch what was taken; collect the oldest batch once the device has enough, or nothing more came."""
        if parts:
            under_way.append(self._start(parts))
        elif not under_way:
            self._idle()
        if under_way and (len(under_way) >= self._depth or not parts):
            self._collect(under_way[0])
            under_way.popleft()
        self._flush()

    def _idle(self) -> None:
        """A replica that has given up refuses all requests, so that only a probe can find out that it works again."""
        if self._breaker.is_open:
            self._breaker.probe()
        self._on_idle()

    def _watched(self, call: Callable[[], T]) -> T:
        with self._watchdog.computing():
            return call()

    def _launch_watched(self, head: str, work: Work) -> Collect:
        collect = self._watched(lambda: self._launch(head, work))
        return lambda: self._watched(collect)

    def _start(self, parts: list[Part]) -> _UnderWay:
        started = time.monotonic()
        for part in parts:
            part.job.started = started if part.job.started is None else part.job.started
        head = parts[0].job.head
        recovery = Recovery(lambda work: self._launch_watched(head, work), self._budget, self._breaker)
        try:
            forward = recovery.start(_work(parts))
        except BaseException:
            _fail(parts)
            raise
        return _UnderWay(parts, recovery, forward, started)

    def _collect(self, batch: _UnderWay) -> None:
        outcome = batch.recovery.finish(batch.forward)
        forward_s = time.monotonic() - batch.started
        scatter(batch.parts, outcome, forward_s)
        self._apply_budget()
        self._report(batch, outcome, forward_s)

    def _apply_budget(self) -> None:
        self._scheduler.limits = replace(self._configured, max_batch_tokens=self._budget.current)

    def _report(self, batch: _UnderWay, outcome: Outcome, forward_s: float) -> None:
        tokens = batch.forward.work.tokens
        self._scheduler.computed(int(tokens.cu_seqlens[-1]), forward_s)
        self._observe(
            BatchReport(
                tokens=int(tokens.cu_seqlens[-1]),
                sequences=tokens.num_sequences,
                forward_s=forward_s,
                queued_tokens=self._scheduler.queued_tokens,
                out_of_memory=batch.recovery.out_of_memory,
                failures=len(outcome.failures),
            )
        )

    def _flush(self) -> None:
        """Hand finished jobs to the event loop, all at once: one wake-up a batch."""
        jobs = []
        while self._finished:
            jobs.append(self._finished.popleft())
        if not jobs or self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._deliver, jobs)

    def _deliver(self, jobs: list[Job]) -> None:
        for job in jobs:
            call = self._calls.pop(job, None)
            if call is not None:
                self._close(call)

    def _close(self, call: _Call) -> None:
        """One more of its jobs is done."""
        call.open_jobs -= 1
        if not call.open_jobs and not call.future.done():
            call.future.set_result(None)


def _fail(parts: list[Part]) -> None:
    lost = UnavailableError("the device failed while it computed this request", retry_after_s=1.0)
    for part in parts:
        finish(part.job, lost)


def _work(parts: list[Part]) -> Work:
    """The parts' sequences one after the other, each with its job's arguments."""
    arguments: list[HeadArguments | None] = []
    for part in parts:
        arguments += [part.job.arguments] * (part.last - part.first)
    needed = any(one is not None for one in arguments)
    return Work(concatenate([part.tokens() for part in parts]), tuple(arguments) if needed else ())


def scatter(parts: list[Part], outcome: Outcome, forward_s: float) -> None:
    """Give each job its rows; finish the jobs that are complete and those of which a sequence failed."""
    at = 0
    for part in parts:
        job, count = part.job, part.last - part.first
        job.forward_s += forward_s
        failure = next((outcome.failures[i] for i in range(at, at + count) if i in outcome.failures), None)
        if failure is not None:
            finish(job, failure)
        elif not job.done:
            job.rows.append(outcome.rows.select(at, at + count))
            job.finished += count
            if job.finished == job.tokens.num_sequences:
                finish(job)
        at += count


def _rows(tokens: TokenBatch, call: _Call) -> Rows:
    """All requests' rows in order; a request that failed gets zeros, or none where the head leaves ragged rows."""
    queue_s, forward_s = np.zeros(tokens.num_requests), np.zeros(tokens.num_requests)
    failures: dict[int, ServeAppError] = {}
    pieces = []
    for index in range(tokens.num_requests):
        job = call.jobs.get(index)
        if job is None:
            continue  # no sequences, no rows
        queue_s[index], forward_s[index] = job.queue_s, job.forward_s
        if job.error is not None:
            failures[index] = job.error
            pieces.append(failed(job.tokens.num_sequences))
        else:
            pieces += job.rows
    rows = stack(pieces)
    return Rows(rows.values, queue_s, forward_s, failures, rows.cu_rows)

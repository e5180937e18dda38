"""Which sequences go into the next forward pass: oldest first, within a token budget, decided when the device is free.

Pull-based: a batch is closed by `take`, which the device thread calls when it has nothing to do, never before. So while
a forward runs the next batch fills up, and an idle device never waits for a batch that is not coming.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from serve_app.errors import DeadlineExceededError, InputTooLongError, OverloadedError, ServeAppError, UnavailableError
from serve_app.model.rows import SequenceRows
from serve_app.model.speed import Speed
from serve_app.types import BULK_EVERY, HeadArguments, Priority, TokenBatch


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch and the whole queue may hold."""

    max_batch_tokens: int
    max_batch_sequences: int
    max_queued_tokens: int


@dataclass(eq=False, slots=True)
class Job:
    """One request's sequences on their way through the device.

    `tokens` holds one request; `deadline` is on `time.monotonic`'s clock. `on_done` is called exactly once, on the
    thread that finished the job: with its rows, part by part in order, or with the error.
    """

    tokens: TokenBatch
    head: str
    on_done: Callable[[Job], None]
    priority: Priority = "interactive"
    deadline: float | None = None
    arguments: HeadArguments | None = None
    goes_first: bool = False
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    forward_s: float = 0.0
    taken: int = 0
    """Sequences handed out by `take` so far."""
    finished: int = 0
    longest: int = field(init=False)
    rows: list[SequenceRows] = field(default_factory=list)
    error: ServeAppError | None = None
    done: bool = False

    def __post_init__(self) -> None:
        self.longest = int(self.tokens.lengths().max(initial=0))

    @property
    def waiting(self) -> int:
        return self.tokens.num_sequences - self.taken

    @property
    def waiting_tokens(self) -> int:
        cu = self.tokens.cu_seqlens
        return int(cu[-1] - cu[self.taken])

    @property
    def queue_s(self) -> float:
        """Seconds from submission to the start of its first forward."""
        return (self.started if self.started is not None else time.monotonic()) - self.submitted


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences first..last-1 of a job, in one batch."""

    job: Job
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        cu = self.job.tokens.cu_seqlens
        return int(cu[self.last] - cu[self.first])

    def tokens(self) -> TokenBatch:
        return self.job.tokens.select(self.first, self.last)


class Scheduler:
    """A queue of jobs, bounded in tokens: first in, first out, but for those that go first.

    Thread-safe: `submit` and `cancel` from any thread.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queues: dict[Priority, deque[Job]] = {"interactive": deque(), "bulk": deque()}
        self._queued_tokens = 0
        self._turns = itertools.count(1)
        self._closed: ServeAppError | None = None
        self._changed = threading.Condition()
        self._speed = Speed()

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        """Applies from the next batch on; queued inputs that no longer fit are refused when their turn comes."""
        with self._changed:
            self._limits = limits

    @property
    def queued_tokens(self) -> int:
        """Tokens waiting, not counting what is being computed."""
        return self._queued_tokens

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises InputTooLongError if one of its sequences can never fit a batch, OverloadedError if the queue is full,
        UnavailableError once closed. A job larger than the whole queue is accepted by an empty one.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if job.longest > self._limits.max_batch_tokens:
                raise self._too_long(job)
            if self._queued_tokens and self._queued_tokens + job.waiting_tokens > self._limits.max_queued_tokens:
                raise OverloadedError(
                    f"{self._queued_tokens} tokens are waiting in this replica; try again later",
                    retry_after_s=self._speed.wait_s(self._queued_tokens - self._limits.max_queued_tokens / 2),
                )
            queue = self._queues[job.priority]
            queue.appendleft(job) if job.goes_first else queue.append(job)
            self._queued_tokens += job.waiting_tokens
            self._changed.notify()

    def computed(self, tokens: int, seconds: float) -> None:
        """What a forward took, from which follows how long those wait who are refused: until half the room is free."""
        self._speed.add(tokens, seconds)

    def _too_long(self, job: Job) -> InputTooLongError:
        return InputTooLongError(
            f"an input has {job.longest} tokens, and this replica computes at most {self._limits.max_batch_tokens} "
            "at a time; shorten it"
        )

    def cancel(self, job: Job) -> int:
        """Take back what was not started; a running forward is not interrupted. `on_done` is not called after this.

        Returns the tokens that will now never be computed.
        """
        with self._changed:
            taken_back = 0
            if job in self._queues[job.priority]:
                taken_back = job.waiting_tokens
                self._remove(job)
            job.done = True
            return taken_back

    def take(self, timeout_s: float | None = None) -> list[Part] | None:
        """Wait for work and close a batch. [] after `timeout_s` without any; None once closed and empty.

        Expired jobs are failed here, before they cost a forward.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed is not None or self._waiting(), timeout_s)
            hopeless = list(self._drop_hopeless())
            parts = self._fill()
            over = self._closed is not None and not parts
        for job, error in hopeless:
            finish(job, error)
        return None if over else parts

    def close(self, reason: ServeAppError | None = None) -> None:
        """Refuse new work, fail what waits, and end `take`."""
        reason = reason or UnavailableError("this replica is shutting down", retry_after_s=1.0)
        with self._changed:
            self._closed = reason
            left = [job for queue in self._queues.values() for job in queue]
            for job in left:
                self._remove(job)
            self._changed.notify_all()
        for job in left:
            finish(job, reason)

    def _waiting(self) -> bool:
        return any(self._queues.values())

    def _remove(self, job: Job) -> None:
        self._queues[job.priority].remove(job)
        self._queued_tokens -= job.waiting_tokens

    def _drop_hopeless(self) -> Iterator[tuple[Job, ServeAppError | None]]:
        """Jobs that nobody waits for any more, or that the limits (which may have shrunk) now exclude."""
        now = time.monotonic()
        for queue in self._queues.values():
            for job in [j for j in queue if j.done or self._reason_to_drop(j, now) is not None]:
                self._remove(job)
                yield job, self._reason_to_drop(job, now)

    def _reason_to_drop(self, job: Job, now: float) -> ServeAppError | None:
        if job.deadline is not None and job.deadline <= now:
            return DeadlineExceededError("the request's time ran out while it waited for the model")
        if job.longest > self._limits.max_batch_tokens:
            return self._too_long(job)
        return None

    def _fill(self) -> list[Part]:
        parts: list[Part] = []
        tokens_left, sequences_left, head = self._limits.max_batch_tokens, self._limits.max_batch_sequences, None
        for queue in self._order():
            while queue and sequences_left and head in (None, queue[0].head):
                part = self._cut(queue[0], tokens_left, sequences_left)
                if part is None:  # the misfit stays at the front and leads the next batch
                    return parts
                parts.append(part)
                head = part.job.head
                tokens_left -= part.num_tokens
                sequences_left -= part.last - part.first
                if not part.job.waiting:
                    queue.popleft()
        return parts

    def _order(self) -> list[deque[Job]]:
        interactive, bulk = self._queues["interactive"], self._queues["bulk"]
        if interactive and bulk and next(self._turns) % BULK_EVERY == 0:
            return [bulk, interactive]
        return [interactive, bulk]

    def _cut(self, job: Job, tokens_left: int, sequences_left: int) -> Part | None:
        """As many of the job's next sequences as fit, or None if not even one does."""
        cu = job.tokens.cu_seqlens
        fitting = int(np.searchsorted(cu, cu[job.taken] + tokens_left, side="right")) - 1
        last = min(fitting, job.taken + sequences_left)
        if last <= job.taken:
            return None
        part = Part(job, job.taken, last)
        self._queued_tokens -= part.num_tokens
        job.taken = last
        return part


def finish(job: Job, error: ServeAppError | None = None) -> None:
    """Mark the job as done, with an error or with its rows, and tell its owner once."""
    if job.done:
        return
    job.error = error
    job.done = True
    job.on_done(job)

"""Holds requests back while enough batches are under way, and lets them go in groups.

`@serve.batch` seals a batch before it waits for a free slot, so with every slot busy, requests that arrive one by one
become batches of one. The gate stands before it: while a slot is free a request passes at once (an idle ingress adds
no waiting), and when a batch ends, all that waited go together, in one turn of the event loop, and become one batch.
`@serve.batch` also takes everything that is there into one batch, so a group goes only when the one before it has
become a batch: else groups for several free slots would be one batch, and one replica would get what was for all.

Half of the slots keep the replicas busy, the other half what they will compute next. When a batch ends, its clients'
next requests come in one by one, some milliseconds apart. The first to come would take the free slot alone, and its
call would cost as much as one with all of them, only to wait at a busy replica. So while half of the slots are taken,
a group goes when it has an even share of what is outstanding, or after a fraction of the time that a batch takes.

Bulk requests go when no others wait, and every fourth group is one of theirs while others do. Their groups are their
own, since a group is answered as one, and they leave a slot to the others, who would else wait for the end of a batch.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve_app.types import BULK_EVERY, Priority

HOLD_SHARE = 0.2
"""Of a batch's usual time, from being let go to its last answer: so long may a small group be held for more to come."""
MOST_HOLD_S = 0.05
_SMOOTHING = 0.2
"""Weight of the newest batch in the usual time."""


@dataclass(frozen=True, slots=True)
class GateLimits:
    """How many batches may be under way, and what one may hold."""

    max_groups: int
    max_requests: int
    max_characters: int


@dataclass(eq=False, slots=True)
class Group:
    """Requests of one priority that were let go together.

    It takes more until its batch starts, and ends with its last request.
    """

    priority: Priority = "interactive"
    requests: int = 0
    characters: int = 0
    unfinished: int = 0
    sealed: bool = False
    opened: float = field(default_factory=time.monotonic)


@dataclass(eq=False, slots=True)
class _Waiter:
    characters: int
    priority: Priority
    since: float = field(default_factory=time.monotonic)
    admitted: asyncio.Future[Group] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Queue:
    """What waits of one priority, and what is outstanding: waiting or let go, and not finished."""

    def __init__(self) -> None:
        self.waiting: deque[_Waiter] = deque()
        self.waiting_characters = 0
        self.outstanding_characters = 0
        self.groups = 0


class Gate:
    """First in, first out among requests of one priority. All methods belong to one event loop."""

    def __init__(self, limits: GateLimits) -> None:
        self._limits = limits
        self._queues: dict[Priority, _Queue] = {"interactive": _Queue(), "bulk": _Queue()}
        self._forming: Group | None = None
        self._usual_s = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._turns = itertools.count(1)

    @property
    def waiting(self) -> int:
        return sum(len(queue.waiting) for queue in self._queues.values())

    @property
    def _groups(self) -> int:
        return sum(queue.groups for queue in self._queues.values())

    def set_limits(self, limits: GateLimits) -> None:
        self._limits = limits
        self._release()

    @asynccontextmanager
    async def admitted(self, characters: int, priority: Priority = "interactive") -> AsyncIterator[Group]:
        """Wait for a place; the block is the request's time in its batch. `characters` weighs it."""
        queue = self._queues[priority]
        queue.outstanding_characters += characters
        try:
            group = await self._enter(characters, priority)
        except BaseException:
            queue.outstanding_characters -= characters
            raise
        try:
            yield group
        finally:
            queue.outstanding_characters -= characters
            self._leave(group)

    async def _enter(self, characters: int, priority: Priority) -> Group:
        if not self._goes_before(priority) and (group := self._open_group(characters, priority)) is not None:
            _join(group, characters)
            return group
        waiter, queue = _Waiter(characters, priority), self._queues[priority]
        queue.waiting.append(waiter)
        queue.waiting_characters += characters
        self._release()
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def _goes_before(self, priority: Priority) -> bool:
        """Whether a request waits that goes before one of this priority."""
        return bool(self._queues["interactive"].waiting or (priority == "bulk" and self._queues["bulk"].waiting))

    def _give_up(self, waiter: _Waiter) -> None:
        """The caller left: while it waited, or in the moment between being let go and going."""
        queue = self._queues[waiter.priority]
        if waiter.admitted.done() and not waiter.admitted.cancelled():
            self._leave(waiter.admitted.result())
        elif waiter in queue.waiting:
            queue.waiting.remove(waiter)
            queue.waiting_characters -= waiter.characters

    def _open_group(self, characters: int, priority: Priority) -> Group | None:
        """The group that is forming, if this request fits it; else a new one, if a slot is free."""
        forming = self._forming
        if forming is not None and not forming.sealed:
            return forming if forming.priority == priority and self._fits(forming, characters) else None
        if not self._has_slot(priority) or (self._busy() and characters < self._share(priority)):
            return None
        return self._begin(priority)

    def _begin(self, priority: Priority) -> Group:
        self._queues[priority].groups += 1
        self._forming = group = Group(priority)
        return group

    def _has_slot(self, priority: Priority) -> bool:
        """Whether a slot is free for another group. One is left to interactive requests, if there are two."""
        most = self._limits.max_groups
        if priority == "bulk" and self._queues["bulk"].groups >= max(1, most - 1):
            return False
        return self._groups < most

    def _busy(self) -> bool:
        """Whether so many groups are under way that one more would only wait for a replica."""
        return self._groups >= -(-self._limits.max_groups // 2)

    def _fits(self, group: Group, characters: int) -> bool:
        """A group's last request is the one with which it has its share; left behind, that would be a small group."""
        limits = self._limits
        return (
            group.requests < limits.max_requests
            and group.characters < self._share(group.priority)
            and group.characters + characters <= limits.max_characters
        )

    def _share(self, priority: Priority) -> int:
        """Characters for one group: an even part of all that is outstanding, so that replicas stay evenly loaded.

        The parts are one for each busy replica, and one that gathers meanwhile.
        """
        parts = min(self._limits.max_groups, -(-self._limits.max_groups // 2) + 1)
        even = -(-self._queues[priority].outstanding_characters // parts)
        return min(self._limits.max_characters, even)

    def seal(self, group: Group) -> None:
        """The group's batch has started; the next group may go."""
        if not group.sealed:
            group.sealed = True
            self._release()

    def _leave(self, group: Group) -> None:
        group.unfinished -= 1
        if group.unfinished == 0:
            group.sealed = True
            self._queues[group.priority].groups -= 1
            self._usual_s += _SMOOTHING * (time.monotonic() - group.opened - self._usual_s)
            self._release()

    def _release(self) -> None:
        """Let waiters go into a free slot, oldest first, unless it is worth while to wait for more."""
        if self._forming is not None and not self._forming.sealed:
            return
        while (priority := self._next()) is not None:
            group = self._begin(priority)
            self._admit(group)
            if group.unfinished:
                return
            group.sealed = True
            self._queues[priority].groups -= 1

    def _next(self) -> Priority | None:
        """Whose group goes now, if one does."""
        ready: list[Priority] = [
            priority
            for priority, queue in self._queues.items()
            if queue.waiting and self._has_slot(priority) and not self._holds_on(priority)
        ]
        if len(ready) > 1 and next(self._turns) % BULK_EVERY == 0:
            return "bulk"
        return ready[0] if ready else None

    def _holds_on(self, priority: Priority) -> bool:
        """Whether what waits is too little for a call of its own as yet; then it will be looked at again in time."""
        queue, limits = self._queues[priority], self._limits
        enough = queue.waiting_characters >= self._share(priority) or len(queue.waiting) >= limits.max_requests
        if enough or not self._busy():
            return False
        left_s = queue.waiting[0].since + min(HOLD_SHARE * self._usual_s, MOST_HOLD_S) - time.monotonic()
        if left_s <= 0:
            return False
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(left_s, self._wake)
        return True

    def _wake(self) -> None:
        self._alarm = None
        self._release()

    def _admit(self, group: Group) -> None:
        queue = self._queues[group.priority]
        while queue.waiting and (not group.requests or self._fits(group, queue.waiting[0].characters)):
            waiter = queue.waiting.popleft()
            queue.waiting_characters -= waiter.characters
            if not waiter.admitted.done():
                _join(group, waiter.characters)
                waiter.admitted.set_result(group)


def _join(group: Group, characters: int) -> None:
    group.requests += 1
    group.unfinished += 1
    group.characters += characters

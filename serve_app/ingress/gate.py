"""Holds requests back while enough batches are under way, and lets them go in groups.

`@serve.batch` seals a batch before it waits for a free slot, so with every slot busy, requests that arrive one by one
become batches of one. The gate stands before it: while a slot is free a request passes at once (an idle ingress adds
no waiting), and when a batch ends, all that waited go together, in one turn of the event loop, and become one batch.
`@serve.batch` also takes everything that is there into one batch, so a group goes only when the one before it has
become a batch: else groups for several free slots would be one batch, and one replica would get what was for all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GateLimits:
    """How many batches may be under way, and what one may hold."""

    max_groups: int
    max_requests: int
    max_characters: int


@dataclass(eq=False, slots=True)
class Group:
    """Requests that were let go together. It takes more until its batch starts, and ends with its last request."""

    requests: int = 0
    characters: int = 0
    unfinished: int = 0
    sealed: bool = False


@dataclass(eq=False, slots=True)
class _Waiter:
    characters: int
    admitted: asyncio.Future[Group] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Gate:
    """First in, first out. All methods belong to one event loop."""

    def __init__(self, limits: GateLimits) -> None:
        self._limits = limits
        self._waiting: deque[_Waiter] = deque()
        self._groups = 0
        self._forming: Group | None = None
        self._outstanding_characters = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def set_limits(self, limits: GateLimits) -> None:
        self._limits = limits
        self._release()

    @asynccontextmanager
    async def admitted(self, characters: int) -> AsyncIterator[Group]:
        """Wait for a place; the block is the request's time in its batch. `characters` weighs it."""
        self._outstanding_characters += characters
        try:
            group = await self._enter(characters)
            try:
                yield group
            finally:
                self._leave(group)
        finally:
            self._outstanding_characters -= characters

    async def _enter(self, characters: int) -> Group:
        if not self._waiting and (group := self._open_group(characters)) is not None:
            _join(group, characters)
            return group
        waiter = _Waiter(characters)
        self._waiting.append(waiter)
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def _give_up(self, waiter: _Waiter) -> None:
        """The caller left: while it waited, or in the moment between being let go and going."""
        if waiter.admitted.done() and not waiter.admitted.cancelled():
            self._leave(waiter.admitted.result())
        elif waiter in self._waiting:
            self._waiting.remove(waiter)

    def _open_group(self, characters: int) -> Group | None:
        """The group that is forming, if this request fits it; else a new one, if a slot is free."""
        forming = self._forming
        if forming is not None and not forming.sealed:
            return forming if self._fits(forming, characters) else None
        if self._groups >= self._limits.max_groups:
            return None
        self._groups += 1
        self._forming = Group()
        return self._forming

    def _fits(self, group: Group, characters: int) -> bool:
        limits = self._limits
        return group.requests < limits.max_requests and group.characters + characters <= self._share()

    def _share(self) -> int:
        """Characters for one group: an even part of all that is outstanding, so that slots stay evenly loaded."""
        even = -(-self._outstanding_characters // self._limits.max_groups)
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
            self._groups -= 1
            self._release()

    def _release(self) -> None:
        """Let waiters go into a free slot, oldest first."""
        if self._forming is not None and not self._forming.sealed:
            return
        while self._waiting and self._groups < self._limits.max_groups:
            self._groups += 1
            self._forming = group = Group()
            self._admit(group)
            if group.unfinished:
                return
            group.sealed = True
            self._groups -= 1

    def _admit(self, group: Group) -> None:
        while self._waiting and (not group.requests or self._fits(group, self._waiting[0].characters)):
            waiter = self._waiting.popleft()
            if not waiter.admitted.done():
                _join(group, waiter.characters)
                waiter.admitted.set_result(group)


def _join(group: Group, characters: int) -> None:
    group.requests += 1
    group.unfinished += 1
    group.characters += characters

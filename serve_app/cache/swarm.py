"""Which node gives which piece to which: every node that has a piece can give it.

Nothing here waits or talks to a node: `Delivery` asks what to do next and tells what became of it. All methods run on
one event loop.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CHUNK_BYTES = 8 << 20
UPLOADS_PER_NODE = 4
"""Pieces that one node gives at a time: with CHUNK_BYTES, the bound on its object store's use."""
STRIKES = 3
"""So often may a node fail to give a piece before it counts as unable to give."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a file: `length` bytes from `offset`."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Pull:
    """One piece to be taken from one node."""

    chunk: int
    holder: str


@dataclass(slots=True)
class _Member:
    """A node: what it has, what it still wants (in an order of its own), and which files it has checked."""

    wanted: deque[int]
    has: set[int] = field(default_factory=set)
    checked: set[int] = field(default_factory=set)
    strict: set[int] = field(default_factory=set)
    """Files that arrived altered once: now only from nodes that have checked theirs."""
    strikes: int = 0
    """How often it could not give what it should have."""


class Swarm:
    """The pieces of one model, and the nodes that have or want them.

    A node takes pieces in random order, so that soon each has something that the others lack, and all links are used
    instead of the source's alone. Of the holders of a piece the least busy one gives it.
    """

    def __init__(self, sizes: Sequence[int], chunk_bytes: int = CHUNK_BYTES, seed: int | None = None) -> None:
        self.chunks = list(_cut(sizes, chunk_bytes))
        self._of_file: list[list[int]] = [[] for _ in sizes]
        for index, chunk in enumerate(self.chunks):
            self._of_file[chunk.file].append(index)
        self._holders: list[set[str]] = [set() for _ in self.chunks]
        self._members: dict[str, _Member] = {}
        self._uploads: Counter[str] = Counter()
        self._random = random.Random(seed)

    def join(self, node: str, held: Iterable[int]) -> None:
        """`node` wants every file but those in `held`, which it has and has checked."""
        self.leave(node)
        held = set(held)
        wanted = [index for index, chunk in enumerate(self.chunks) if chunk.file not in held]
        self._random.shuffle(wanted)
        self._members[node] = _Member(deque(wanted))
        for file in held:
            self.has_file(node, file)

    def leave(self, node: str) -> None:
        member = self._members.pop(node, None)
        for index in member.has if member is not None else ():
            self._holders[index].discard(node)

    def members(self) -> list[str]:
        return list(self._members)

    def has_file(self, node: str, file: int) -> None:
        """`node` has the whole file and has checked it; nothing happens if it is no member any more."""
        member = self._members.get(node)
        if member is not None:
            member.checked.add(file)
            for index in self._of_file[file]:
                self._holds(node, member, index)

    def _holds(self, node: str, member: _Member, index: int) -> None:
        member.has.add(index)
        if member.strikes < STRIKES:
            self._holders[index].add(node)

    def lacks_file(self, node: str, file: int) -> None:
        """What `node` got of the file was wrong: it is wanted again, from nodes that have checked it."""
        member = self._members[node]
        member.strict.add(file)
        for index in self._of_file[file]:
            member.has.discard(index)
            self._holders[index].discard(node)
            member.wanted.append(index)

    def is_complete(self, node: str) -> bool:
        """Whether `node` has and has checked every file."""
        return len(self._members[node].checked) == len(self._of_file)

    def uncovered(self) -> list[int]:
        """Files that the members cannot give each other: the source must."""
        return [file for file in range(len(self._of_file)) if not self._is_covered(file)]

    def _is_covered(self, file: int) -> bool:
        pieces = self._of_file[file]
        if not all(self._holders[index] for index in pieces):
            return False
        strict = any(file in member.strict and file not in member.checked for member in self._members.values())
        return not strict or any(file in self._members[name].checked for name in self._holders[pieces[0]])

    def take(self, node: str) -> Pull | None:
        """The next piece for `node`; None if there is none that it wants and somebody can give now."""
        member = self._members[node]
        for _ in range(len(member.wanted)):
            index = member.wanted.popleft()
            if index in member.has:
                continue
            holder = self._giver(index, member)
            if holder is not None:
                self._uploads[holder] += 1
                return Pull(index, holder)
            member.wanted.append(index)
        return None

    def _giver(self, index: int, member: _Member) -> str | None:
        file = self.chunks[index].file
        able = [
            name
            for name in self._holders[index]
            if self._uploads[name] < UPLOADS_PER_NODE
            and (file not in member.strict or file in self._members[name].checked)
        ]
        return min(able, key=lambda name: (self._uploads[name], self._random.random()), default=None)

    def arrived(self, node: str, pull: Pull) -> bool:
        """The piece is on `node`'s disk; whether its file is whole now, and to be checked."""
        self._uploads[pull.holder] -= 1
        member = self._members.get(node)
        if member is None:
            return False
        self._holds(node, member, pull.chunk)
        file = self.chunks[pull.chunk].file
        return file not in member.checked and member.has.issuperset(self._of_file[file])

    def failed(self, node: str, pull: Pull, *, by_holder: bool) -> None:
        """The piece did not come; `node` still wants it. A holder that fails too often is not asked again."""
        self._uploads[pull.holder] -= 1
        if node in self._members:
            self._members[node].wanted.append(pull.chunk)
        holder = self._members.get(pull.holder)
        if by_holder and holder is not None:
            holder.strikes += 1
            if holder.strikes >= STRIKES:
                for index in holder.has:
                    self._holders[index].discard(pull.holder)


def _cut(sizes: Sequence[int], chunk_bytes: int) -> Iterable[Chunk]:
    for file, size in enumerate(sizes):
        for offset in range(0, max(size, 1), chunk_bytes):
            yield Chunk(file, offset, min(chunk_bytes, size - offset))

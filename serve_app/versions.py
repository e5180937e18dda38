"""What ties a tokenizer replica to a model replica, and how both tiers of a model change together.

Serve updates each deployment by itself. A fingerprint says what a replica has loaded; a call carries the fingerprint
that it is meant for, and a replica of another one refuses it. The barrier keeps a replica of a new version from
becoming ready, so that Serve keeps the old replicas, until a replica of each tier has loaded the new version.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from serve_app.config import ModelConfig
from serve_app.timeouts import within
from serve_app.types import TokenBatch, Version

TierName: TypeAlias = Literal["tokenizer", "model"]

SOFTWARE = ("serve-app", "transformers", "tokenizers")
"""Packages whose change makes another version of every model: replicas of two releases are not put together."""

PRESENT_S = 3.0
"""Pause between two messages by which a replica tells the barrier that it lives."""

LOST_AFTER_S = 4 * PRESENT_S
"""A replica that has been silent for so long does not count any more."""

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt"})
_CHUNK_BYTES = 4 << 20


def version_of(path: Path, model: ModelConfig, *, is_pinned: bool) -> Version:
    """The version of the model files in `path`, served as `model` says. Reads files unless `is_pinned`.

    `is_pinned` says that the folder's name changes with its content, as in the cache. Elsewhere every file but the
    weights is read; of the weights only names and sizes count.
    """
    revision = path.name if is_pinned else _digest(_content(path))[:12]
    parts = (model.model_dump_json(), revision, *map(_release, SOFTWARE))
    return Version(_digest(part.encode() + b"\0" for part in parts)[:16], revision)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _content(folder: Path) -> Iterator[bytes]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode()
        if file.suffix not in _WEIGHTS:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    yield chunk


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its sources, without being installed
        return ""


@dataclass(frozen=True, slots=True)
class Member:
    """One replica that has loaded its version; `replica` is its id in Serve."""

    model: str
    tier: TierName
    fingerprint: str
    replica: str


@dataclass(slots=True)
class _Presence:
    seen_at: float
    probe: TokenBatch | None


class VersionBarrier:
    """Knows which loaded replicas there are, and lets one become ready when that takes nothing from anybody.

    Belongs to one event loop. What it knows is told again by every replica every `PRESENT_S` seconds, so that a
    barrier that starts anew in a running cluster learns it, and waits that long before it takes silence for absence.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._born_at = clock()
        self._members: dict[Member, _Presence] = {}
        self._changed = asyncio.Event()

    def present(self, member: Member, probe: TokenBatch | None = None) -> None:
        """`member` lives. A tokenizer replica brings a `probe`: a text that it has encoded, for model replicas."""
        is_new = member not in self._members
        self._members[member] = _Presence(self._clock(), probe)
        if is_new:
            self._changed.set()
            self._changed = asyncio.Event()

    async def probe(self, model: str, fingerprint: str) -> TokenBatch:
        """What a tokenizer replica of that version has encoded, as soon as there is one."""
        while True:
            for member, presence in self._alive(model):
                if member.fingerprint == fingerprint and presence.probe is not None:
                    return presence.probe
            await self._wait()

    async def enter(self, member: Member, probe: TokenBatch | None = None) -> None:
        """Return when `member`, which has loaded and goes on telling that it is present, may become ready."""
        self.present(member, probe)
        while not self.may_enter(member):
            await self._wait()

    def may_enter(self, member: Member) -> bool:
        """Whether the member's version has a replica in the other tier, or no replica of another version is there."""
        others = [other for other, _ in self._alive(member.model)]
        if any(other.fingerprint == member.fingerprint and other.tier != member.tier for other in others):
            return True
        knows_all = self._clock() - self._born_at > PRESENT_S
        return knows_all and all(other.fingerprint == member.fingerprint for other in others)

    def _alive(self, model: str) -> list[tuple[Member, _Presence]]:
        oldest = self._clock() - LOST_AFTER_S
        self._members = {member: known for member, known in self._members.items() if known.seen_at >= oldest}
        return [(member, known) for member, known in self._members.items() if member.model == model]

    async def _wait(self) -> None:
        """Until a replica comes, or time has passed in which one may have gone."""
        with suppress(asyncio.TimeoutError):
            await within(self._changed.wait(), PRESENT_S / 3)

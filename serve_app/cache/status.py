"""How far each model is on each node, for operators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

Phase: TypeAlias = Literal["pending", "downloading", "verifying", "ready", "error"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a model is that is arriving on a node."""

    phase: Phase
    bytes_done: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class ModelOnNode:
    """One model on one node. Sizes in bytes, times in seconds; `error` says why, where the phase is "error"."""

    node_id: str
    address: str
    model: str
    revision: str
    phase: Phase
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_per_s: float = 0.0
    seconds_left: float | None = None
    error: str | None = None

    def at(self, progress: Progress) -> ModelOnNode:
        """The same, as far as `progress` says; rate and time left are averages since it began."""
        rate = progress.bytes_done / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
        left = (self.bytes_total - progress.bytes_done) / rate if rate > 0 else None
        done = progress.bytes_done
        return replace(self, phase=progress.phase, bytes_done=done, bytes_per_s=rate, seconds_left=left)

"""How far each model is on each node, for operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Phase: TypeAlias = Literal["pending", "downloading", "verifying", "ready", "error"]
PHASES: tuple[Phase, ...] = get_args(Phase)


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a model is that is arriving on a node."""

    phase: Phase
    bytes_done: int
    elapsed_s: float

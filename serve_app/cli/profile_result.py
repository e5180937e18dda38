"""What a profile found, and the settings that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GOOD_ENOUGH = 0.97
"""Of two budgets that are about as fast the smaller is better: a request waits for the whole batch before it."""


@dataclass(frozen=True, slots=True)
class LengthCost:
    """Texts of one length: seconds for each text, tokenized and computed in full batches, and computed alone."""

    tokens: int
    tokenize_s: float
    forward_s: float
    alone_s: float

    @property
    def tokenize_us_per_token(self) -> float:
        return self.tokenize_s / self.tokens * 1e6

    @property
    def forward_us_per_token(self) -> float:
        return self.forward_s / self.tokens * 1e6


@dataclass(frozen=True, slots=True)
class Layout:
    """So many replicas of so many threads, all at work: tokens per second of all together."""

    replicas: int
    threads: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, with one thread for the first three."""

    model: str
    attention: str
    tokens_per_text: float
    tokenize_tokens_per_s: float
    lengths: Sequence[LengthCost]
    budgets: Mapping[int, float]
    """Tokens of a batch → tokens per second of the corpus in its order."""
    layouts: Sequence[Layout]

    @property
    def best_budget(self) -> int:
        return best_budget(self.budgets)

    @property
    def best_layout(self) -> Layout:
        return max(self.layouts, key=lambda layout: layout.tokens_per_s)

    @property
    def tokenizers_per_model_replica(self) -> float:
        """Cores of tokenizing that keep one model replica of the best layout busy."""
        best = self.best_layout
        return best.tokens_per_s / best.replicas / self.tokenize_tokens_per_s

    @property
    def tokenize_share(self) -> float:
        """Of the time that a text takes on one thread, both steps together."""
        tokenize, forward = 1 / self.tokenize_tokens_per_s, 1 / self.budgets[self.best_budget]
        return tokenize / (tokenize + forward)


def best_budget(speeds: Mapping[int, float]) -> int:
    """The smallest budget that is about as fast as the fastest."""
    enough = max(speeds.values()) * GOOD_ENOUGH
    return min(budget for budget, speed in speeds.items() if speed >= enough)

"""Heads that make one embedding of each sequence, on the device, from hidden states without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Head: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`head(hidden (total, h), cu_seqlens (n + 1,) int64) -> (n, d) float32`, all on one device. A task's device part."""


def pooled(pooling: Literal["mean", "cls", "lasttoken"]) -> Head:
    """The head for one way of pooling; rows are float32 and not normalised."""
    return {"mean": mean, "cls": cls, "lasttoken": last_token}[pooling]


def mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over each sequence's tokens, summed in float32."""
    lengths = cu_seqlens.diff()
    return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0, unsafe=True)


def cls(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first token of each sequence."""
    return hidden.index_select(0, cu_seqlens[:-1]).float()


def last_token(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last token of each sequence."""
    return hidden.index_select(0, cu_seqlens[1:] - 1).float()


HEADS: Mapping[str, Callable[[Literal["mean", "cls", "lasttoken"]], Head]] = {"pooled": pooled}
"""What makes the head of each name, from the model's way of pooling."""

"""Sequences in padded buckets of near-equal length: for models that cannot be packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve_app.types import Int32Array, TokenBatch

IndexArray = npt.NDArray[np.int64]

_PASS_COST = 64.0
"""What one more forward pass costs, in padded tokens: splitting further must save more than this."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some sequences of a batch after the model: `hidden` (total, h), `cu_seqlens` (k + 1,) int64 on the device.

    `rows` (k,) says which sequences of the batch these are, in this order.
    """

    rows: IndexArray
    hidden: Tensor
    cu_seqlens: Tensor


def split(lengths: Int32Array, max_padded_tokens: int) -> list[IndexArray]:
    """Put sequences in the buckets that cost least: padded tokens, plus a fixed cost for each bucket.

    `lengths` (n,) in tokens. Every index is in one bucket; each bucket is sorted from long to short, and has at most
    `max_padded_tokens` padded tokens unless it holds one sequence alone. Exact, by dynamic programming over the
    sorted lengths, where an optimal bucket is always a run.
    """
    order = np.argsort(-lengths, kind="stable")
    cuts = _cheapest_cuts(lengths[order].astype(np.float64), max_padded_tokens)
    return [order[first:last] for first, last in pairwise(cuts)]


def split_equal(lengths: Int32Array, max_tokens: int) -> list[IndexArray]:
    """Put only sequences of one length in a bucket, at most `max_tokens` unless it is one alone: no padding at all."""
    order = np.argsort(-lengths, kind="stable")
    buckets: list[IndexArray] = []
    for same in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        size = max(1, max_tokens // int(lengths[same[0]]))
        buckets.extend(same[first : first + size] for first in range(0, len(same), size))
    return buckets


def _cheapest_cuts(descending: npt.NDArray[np.float64], max_padded_tokens: int) -> list[int]:
    n = len(descending)
    cost = np.zeros(n + 1)
    previous = np.zeros(n + 1, np.int64)
    for last in range(1, n + 1):
        size = np.arange(last, 0, -1)
        padded = descending[:last] * size
        padded[(padded > max_padded_tokens) & (size > 1)] = np.inf
        total = cost[:last] + padded
        previous[last] = int(total.argmin())
        cost[last] = total[previous[last]] + _PASS_COST
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(previous[cuts[-1]]))
    return cuts[::-1]


@dataclass(frozen=True, slots=True)
class BucketedForward:
    """The ordinary padded and masked forward pass, bucket by bucket."""

    module: Any
    device: torch.device
    pad_token_id: int
    takes_token_types: bool
    equal_lengths: bool = False
    """For models whose answers padding changes."""
    max_padded_tokens: int = 16_384

    def __call__(self, batch: TokenBatch) -> Iterator[Part]:
        """Compute all sequences of `batch`, which has at least one; call under `inference_mode`."""
        buckets = (split_equal if self.equal_lengths else split)(batch.lengths(), self.max_padded_tokens)
        for rows in buckets:
            yield self._forward(batch, rows)

    def _forward(self, batch: TokenBatch, rows: IndexArray) -> Part:
        lengths = batch.lengths()[rows].astype(np.int64)
        real = np.arange(lengths.max())[None, :] < lengths[:, None]
        tokens = np.concatenate([np.arange(batch.cu_seqlens[row], batch.cu_seqlens[row + 1]) for row in rows])
        inputs = {
            "input_ids": self._padded(batch.input_ids, tokens, real, self.pad_token_id),
            "attention_mask": torch.from_numpy(real.astype(np.int64)).to(self.device),
        }
        if self.takes_token_types and batch.token_type_ids is not None:
            inputs["token_type_ids"] = self._padded(batch.token_type_ids, tokens, real, 0)
        hidden = self.module(**inputs).last_hidden_state
        kept = torch.from_numpy(np.flatnonzero(real)).to(self.device)
        cu_seqlens = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])).to(self.device)
        return Part(rows, hidden.flatten(0, 1).index_select(0, kept), cu_seqlens)

    def _padded(self, flat: Int32Array, tokens: IndexArray, real: npt.NDArray[np.bool_], fill: int) -> Tensor:
        padded = np.full(real.shape, fill, np.int64)
        padded[real] = flat[tokens]
        return torch.from_numpy(padded).to(self.device)

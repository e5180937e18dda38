"""Sequences in padded buckets of near-equal length: for models that cannot be packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    `rows` (k,) says which sequences of the batch these are, in this order; `lengths` (k,) int64 and `input_ids`
    (total,) int32 are theirs, on the host. Where the whole model was computed, its own head included, `hidden` is what
    the head made of each token, or of each sequence: (total, d) or (k, d).
    """

    rows: IndexArray
    hidden: Tensor
    cu_seqlens: Tensor
    lengths: IndexArray
    input_ids: Int32Array


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


def last_hidden_state(output: Any) -> Tensor:
    """What an encoder makes of every token, (b, length, h)."""
    hidden: Tensor = output.last_hidden_state
    return hidden


LAST_TOKEN = -1
"""In place of a decoder's first token: the last one of the text, as mBART has it."""


def shifted(input_ids: Int32Array, cu_seqlens: IndexArray, first: int) -> Int32Array:
    """What a decoder reads while it classifies: each sequence one to the right, behind `first`."""
    moved = np.roll(input_ids, 1)
    moved[cu_seqlens[:-1]] = input_ids[cu_seqlens[1:] - 1] if first == LAST_TOKEN else first
    return moved


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
    decoder_start: int | None = None
    """First token of the decoder, where `module` has one that must be told what to read."""
    read: Callable[[Any], Tensor] = last_hidden_state
    """What to take of the model's output: (b, length, d), or (b, d) where it is made of whole sequences."""

    def __call__(self, batch: TokenBatch) -> Iterator[Part]:
        """Compute all sequences of `batch`, which has at least one; call under `inference_mode`."""
        buckets = (split_equal if self.equal_lengths else split)(batch.lengths(), self.max_padded_tokens)
        for rows in buckets:
            yield self._forward(batch, rows)

    def _forward(self, batch: TokenBatch, rows: IndexArray) -> Part:
        lengths = batch.lengths()[rows].astype(np.int64)
        real = np.arange(lengths.max())[None, :] < lengths[:, None]
        tokens = np.concatenate([np.arange(batch.cu_seqlens[row], batch.cu_seqlens[row + 1]) for row in rows])
        input_ids, cu_seqlens = batch.input_ids[tokens], np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        inputs = {
            "input_ids": self._padded(input_ids, real, self.pad_token_id),
            "attention_mask": torch.from_numpy(real.astype(np.int64)).to(self.device),
        }
        if self.takes_token_types and batch.token_type_ids is not None:
            inputs["token_type_ids"] = self._padded(batch.token_type_ids[tokens], real, 0)
        if self.decoder_start is not None:
            read_by_decoder = shifted(input_ids, cu_seqlens, self.decoder_start)
            inputs["decoder_input_ids"] = self._padded(read_by_decoder, real, self.pad_token_id)
        hidden = self.read(self.module(**inputs))
        if hidden.dim() == 3:
            kept = torch.from_numpy(np.flatnonzero(real)).to(self.device)
            hidden = hidden.flatten(0, 1).index_select(0, kept)
        return Part(rows, hidden, torch.from_numpy(cu_seqlens).to(self.device), lengths, input_ids)

    def _padded(self, flat: Int32Array, real: npt.NDArray[np.bool_], fill: int) -> Tensor:
        padded = np.full(real.shape, fill, np.int64)
        padded[real] = flat
        return torch.from_numpy(padded).to(self.device)

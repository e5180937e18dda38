"""The heads that a loaded model can be asked for: what is kept of a part of a batch once the model has computed it.

How many rows a sequence leaves is known on the host beforehand, from lengths and input ids, so that launching never
waits for the device; `splade` alone has to ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from serve_app.model.bucketing import IndexArray, Part
from serve_app.model.loader import LoadedModel
from serve_app.model.stock import OwnHead
from serve_app.tasks.heads import HEADS, NO_ARGUMENTS, fill_masks, indices_on, pooled, splade
from serve_app.types import HeadArguments

Arguments: TypeAlias = tuple[HeadArguments | None, ...]
"""What the head is told of each sequence of a batch; () where it needs nothing."""


@dataclass(frozen=True, slots=True)
class Kept:
    """`rows` (r, d) on the device; `counts` (k,) of them belong to each sequence, None where each has one."""

    rows: Tensor
    counts: IndexArray | Tensor | None = None


Head: TypeAlias = Callable[[Part, Arguments], Kept]


def heads_of(loaded: LoadedModel, own: OwnHead | None) -> Mapping[str, Head]:
    """The heads for the task that the model is loaded for, by name; `own` is its own head, where it has one."""
    found = _without_head(loaded) if own is None else _with_head(loaded, own)
    return {name: found[name] for name in HEADS[loaded.task]}


def _without_head(loaded: LoadedModel) -> Mapping[str, Head]:
    pool = pooled(loaded.pooling)
    return {
        "pooled": lambda part, arguments: Kept(pool(part.hidden, part.cu_seqlens)),
        "tokens": lambda part, arguments: Kept(part.hidden, part.lengths),
    }


def _with_head(loaded: LoadedModel, own: OwnHead) -> Mapping[str, Head]:
    def each_token(part: Part, arguments: Arguments) -> Kept:
        return Kept(own.tokens(part.hidden), part.lengths)

    return {
        "sequence-logits": lambda part, arguments: Kept(own.sequences(part)),
        "token-logits": each_token,
        "span-logits": each_token,
        "mask-fill": lambda part, arguments: _fill(part, arguments, loaded, own),
        "splade": lambda part, arguments: Kept(
            *splade(part.hidden, part.lengths.tolist(), own.tokens, loaded.vocab_size)
        ),
    }


def _fill(part: Part, arguments: Arguments, loaded: LoadedModel, own: OwnHead) -> Kept:
    """Mask tokens alone are projected on the vocabulary."""
    masks = np.flatnonzero(part.input_ids == loaded.mask_token_id)
    sequence_of = np.searchsorted(part.lengths.cumsum(), masks, side="right")
    asked = [(arguments[part.rows[i]] if arguments else None) or NO_ARGUMENTS for i in sequence_of]
    hidden = part.hidden.index_select(0, indices_on(part.hidden, masks))
    rows, counts = fill_masks(hidden, asked, own.tokens, loaded.vocab_size)
    per_sequence = np.bincount(sequence_of, weights=counts, minlength=len(part.lengths)).astype(np.int64)
    return Kept(rows, per_sequence)

"""Windows put together again: each token of a text once, from the window in which it has more around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.types import TokenBatch

Places: TypeAlias = npt.NDArray[np.intp]


def token_places(tokens: TokenBatch, sequences: Sequence[int], stride: int) -> Places:
    """Where the tokens of one input are in the flat batch: as its one sequence would have been, had it fitted.

    Special tokens are those of the first window before the text and of the last one after it. Of the `stride` tokens
    that two windows share, the first half is taken from the first of them. `tokens` needs its alignment where there
    are several sequences, and the input must not be a pair.
    """
    first, last = sequences[0], sequences[-1]
    if first == last:
        return np.arange(tokens.cu_seqlens[first], tokens.cu_seqlens[first + 1])
    texts = [_text_of(tokens, sequence) for sequence in sequences]
    kept = [range(text.start + stride // 2, text.stop - (stride - stride // 2)) for text in texts]
    kept[0] = range(int(tokens.cu_seqlens[first]), kept[0].stop)
    kept[-1] = range(kept[-1].start, int(tokens.cu_seqlens[last + 1]))
    return np.concatenate([np.arange(part.start, part.stop) for part in kept])


def _text_of(tokens: TokenBatch, sequence: int) -> range:
    """The tokens of a window that are not special, in the flat batch; all of them where it was sent as token ids."""
    assert tokens.alignment is not None
    first, last = int(tokens.cu_seqlens[sequence]), int(tokens.cu_seqlens[sequence + 1])
    own = np.flatnonzero(tokens.alignment.text_ids[first:last] >= 0)
    return range(first + int(own[0]), first + int(own[-1]) + 1) if len(own) else range(first, last)

"""Batches for tests that look at something else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve_app.types import TokenBatch

NO_TOKENS = TokenBatch(
    input_ids=np.zeros(0, np.int32),
    cu_seqlens=np.zeros(1, np.int32),
    cu_requests=np.zeros(1, np.int32),
    truncated=np.zeros(0, np.bool_),
)


def batch_of(lengths: Sequence[int]) -> TokenBatch:
    """One request's sequences of so many tokens each, all of them zeros."""
    return TokenBatch(
        input_ids=np.zeros(sum(lengths), np.int32),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        cu_requests=np.array([0, len(lengths)], np.int32),
        truncated=np.zeros(len(lengths), np.bool_),
    )

"""Batches for tests that look at something else."""

from __future__ import annotations

import numpy as np

from serve_app.types import TokenBatch

NO_TOKENS = TokenBatch(
    input_ids=np.zeros(0, np.int32),
    cu_seqlens=np.zeros(1, np.int32),
    cu_requests=np.zeros(1, np.int32),
    truncated=np.zeros(0, np.bool_),
)

"""How sparse vectors are written, by the protocols that have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pydantic import BaseModel

from serve_app.outputs import SparseVector
from serve_app.types import Answer


class SparseEntry(BaseModel):
    """A dimension that counts, which is a token of the vocabulary."""

    index: int
    value: float


def sparse_entries(answer: Answer) -> list[list[dict[str, float]]]:
    """For each input its entries, by ascending index."""
    vectors = cast("Sequence[SparseVector]", answer.output)
    return [
        [{"index": i, "value": v} for i, v in zip(vector.indices.tolist(), vector.values.tolist(), strict=True)]
        for vector in vectors
    ]

"""What a head leaves of each sequence, on the host: one row, or as many as it has tokens, masks or weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve_app.types import FloatArray, Int32Array


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """`values` (r, d) float32; `cu_rows` (n + 1,) int32 as in `serve_app.types.Rows`, None where each has one row."""

    values: FloatArray
    cu_rows: Int32Array | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.values) if self.cu_rows is None else len(self.cu_rows) - 1

    def select(self, first: int, last: int) -> SequenceRows:
        """Sequences first..last-1; a view."""
        if self.cu_rows is None:
            return SequenceRows(self.values[first:last])
        cu = self.cu_rows[first : last + 1]
        return SequenceRows(self.values[cu[0] : cu[-1]], cu - cu[0])

    def counts(self) -> npt.NDArray[np.int64]:
        """Rows of each sequence (n,)."""
        return np.ones(len(self.values), np.int64) if self.cu_rows is None else np.diff(self.cu_rows).astype(np.int64)

    def of_row(self, row: int) -> int:
        """The sequence that a row belongs to."""
        return row if self.cu_rows is None else int(np.searchsorted(self.cu_rows, row, side="right")) - 1

    def in_order(self, order: npt.NDArray[np.int64]) -> SequenceRows:
        """These sequences put where `order` (n,) says: the i-th becomes sequence order[i]."""
        if self.cu_rows is None:
            values = np.empty_like(self.values)
            values[order] = self.values
            return SequenceRows(values)
        source = np.argsort(order)
        counts = self.counts()[source]
        cu_rows = _cumulative(counts)
        taken = np.arange(cu_rows[-1]) + np.repeat(self.cu_rows[source] - cu_rows[:-1], counts)
        return SequenceRows(self.values[taken], cu_rows)


def failed(num_sequences: int) -> SequenceRows:
    """What stands for sequences that could not be computed; of no width, and ragged if what it is stacked with is."""
    return SequenceRows(np.zeros((num_sequences, 0), np.float32))


def stack(pieces: Sequence[SequenceRows]) -> SequenceRows:
    """The sequences of all pieces, in order; failed ones get zeros, or no rows where the others are ragged."""
    if len(pieces) == 1:
        return pieces[0]
    width = max((piece.values.shape[1] for piece in pieces), default=0)
    if any(piece.cu_rows is not None for piece in pieces):
        counts = [np.zeros_like(piece.counts()) if _is_failed(piece) else piece.counts() for piece in pieces]
        values = [piece.values for piece in pieces if len(piece.values) and not _is_failed(piece)]
        whole = np.concatenate(values) if values else np.zeros((0, width), np.float32)
        return SequenceRows(whole, _cumulative(np.concatenate(counts)))
    blank = [np.zeros((len(p.values), width), np.float32) if p.values.shape[1] < width else p.values for p in pieces]
    return SequenceRows(np.concatenate(blank) if blank else np.zeros((0, 0), np.float32))


def _is_failed(piece: SequenceRows) -> bool:
    return piece.cu_rows is None and piece.values.shape[1] == 0


def _cumulative(counts: npt.NDArray[np.int64]) -> Int32Array:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])

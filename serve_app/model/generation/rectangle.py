"""Keys and values of all sequences under way, in one tensor a layer: rows join and leave while the others go on.

Rows are aligned on the right: every row's last token stands in the same column, as in a batch with padding on the left,
which is the form in which the stock models decode batches. A step therefore writes one column, attention reads a view,
and relative distances (T5's bias, sliding windows) are those of the row alone. Row i of a batch of n is row i here.

A change happens in full or not at all: every tensor that it needs is allocated before anything is changed, so that a
row that finds no memory leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SLACK = 64
"""Columns that are free after the tensors were made anew; so many steps pass until they are again."""

SPARE_ROWS = 3
"""Rows that may join until the tensors are made anew."""

KeysAndValues = tuple[Tensor, Tensor]
"""One sequence's (1, heads, length, head_dim) each, of one layer."""


class RectangleLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer's part; `keys` and `values` are views of what attention may see."""

    is_sliding = False
    is_croppable = False

    def __init__(self, rectangle: Rectangle, store: list[Tensor]) -> None:
        super().__init__()
        self._rectangle = rectangle
        self.store = store
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first row to join made the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KeysAndValues:
        """Write every row's next column, (n, heads, 1, head_dim); what is returned ends with it."""
        box = self._rectangle
        for tensor, states in zip(self.store, (key_states, value_states), strict=True):
            tensor[: box.rows, :, box.end : box.end + 1] = states
        return self._view(box.end + 1)

    def show(self) -> None:
        """Make `keys` and `values` what is stored, for attention that only reads."""
        self.keys, self.values = self._view(self._rectangle.end)

    def _view(self, end: int) -> KeysAndValues:
        rows, first = self._rectangle.rows, self._rectangle.first
        keys, values = (tensor[:rows, :, first:end] for tensor in self.store)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._rectangle.end - self._rectangle.first

    def get_max_length(self) -> int:
        return -1


class Rectangle:
    """`rows` sequences whose columns are `starts[i]` to `end` - 1."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.end = 0
        self.layers: list[RectangleLayer] = []
        self.cache = Cache(layers=self.layers)

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def first(self) -> int:
        """The first column that any row uses."""
        return min(self.starts, default=self.end)

    @property
    def tokens(self) -> int:
        """Columns times rows for which memory is held."""
        if not self.layers:
            return 0
        rows, _, columns, _ = self.layers[0].store[0].shape
        return int(rows * columns)

    def join(self, layers: Sequence[KeysAndValues]) -> None:
        """A new last row, with what one sequence's prefill left in each layer. If it raises, nothing has changed."""
        length = layers[0][0].shape[2]
        if not self.starts:
            self.clear()  # the tensors of rows that left may have room, but not at these columns
            self._create(layers)
            self.end = length
        try:
            self._make_room(self.rows + 1, max(self.end - self.first, length))
        except BaseException:
            if not self.starts:
                self.clear()
            raise
        row, start = self.rows, self.end - length
        for mine, theirs in zip(self.layers, layers, strict=True):
            for tensor, states in zip(mine.store, theirs, strict=True):
                tensor[row, :, :start] = 0  # see `_make_room`: the row before may have left what is no number
                tensor[row, :, start : self.end] = states[0]
        self.starts.append(start)

    def leave(self, row: int) -> None:
        """Row `row` goes, and the last row takes its place."""
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                for tensor in layer.store:
                    tensor[row, :, : self.end] = tensor[last, :, : self.end]
            self.starts[row] = self.starts[last]
        self.starts.pop()
        if not self.starts:
            self.clear()

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        self.starts.clear()
        self.layers.clear()
        self.end = 0

    def make_room_for_step(self) -> None:
        """So that `end` is a column that can be written."""
        if self.end >= self.layers[0].store[0].shape[2]:
            self._make_room(self.rows, self.end - self.first)

    def advance(self) -> None:
        """The step has written its column in every layer."""
        self.end += 1

    def mask(self, columns: int, device: torch.device) -> Tensor | None:
        """(n, `columns`) int64, 1 where a row has a token, of the columns from `first` on; None where all have."""
        first = self.first
        if all(start == first for start in self.starts):
            return None
        starts = torch.tensor(self.starts, device=device)[:, None] - first
        return (torch.arange(columns, device=device)[None] >= starts).long()

    def _create(self, layers: Sequence[KeysAndValues]) -> None:
        self.layers.extend(
            RectangleLayer(self, [states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in pair])
            for pair in layers
        )

    def _make_room(self, rows: int, span: int) -> None:
        """Room for `rows` rows of `span` columns that end at `end`; tensors are made anew where that takes more."""
        held_rows, _, held_columns, _ = self.layers[0].store[0].shape
        if rows <= held_rows and span <= self.end < held_columns:
            return
        stores = [[self._anew(old, rows, span) for old in layer.store] for layer in self.layers]
        for layer, store in zip(self.layers, stores, strict=True):
            layer.store = store
        self.starts[:] = [start + span - self.end for start in self.starts]
        self.end = span

    def _anew(self, old: Tensor, rows: int, span: int) -> Tensor:
        """A larger tensor with the rows of `old`, which end at column `span`."""
        # Zeros, because attention multiplies what stands in masked columns by 0, and 0 times NaN is NaN.
        new = old.new_zeros(rows + SPARE_ROWS, old.shape[1], span + SLACK, old.shape[3])
        if self.rows:
            first = self.first
            new[: self.rows, :, span - (self.end - first) : span] = old[: self.rows, :, first : self.end]
        return new

"""Keys and values of all rows under way, aligned on the right: two tensors a layer, one column a step.

Every row ends at column `end` - 1, so that all write their next token into the same column; what is left of a row's
start is masked. Steps neither allocate nor move anything until a layer's columns run out; then the layer gets new
tensors, one layer at a time. A sequence with beams has a row for each.

A row joins in full or not at all. Rows are counted when all layers have made room for them, and each layer knows which
columns it holds, so that a row that finds no memory half-way leaves the others as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SLACK = 64
"""Columns that are free after tensors were made anew; so many steps pass until they are again."""

SPARE_ROWS = 3
"""Rows that may join until the tensors are made anew."""

KeysAndValues = tuple[Tensor, Tensor]
"""One sequence's (1, heads, length, head_dim) each, of one layer."""


@dataclass(frozen=True, slots=True)
class Room:
    """Limits of new tensors: rows beyond those in use, and columns, unless more are in use."""

    spare_rows: int = SPARE_ROWS
    most_columns: int = sys.maxsize


class RectangleLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer's part; `keys` and `values` are views of what attention may see."""

    is_sliding = False
    is_croppable = False

    def __init__(self, rectangle: Rectangle, like: KeysAndValues) -> None:
        super().__init__()
        self._rectangle = rectangle
        self.store = [states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in like]
        self._shift = 0
        """The rectangle's column that is the first of `store`."""
        self.is_initialized = True

    @property
    def cells(self) -> int:
        """Rows times columns for which memory is held."""
        rows, _, columns, _ = self.store[0].shape
        return int(rows * columns)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first row to join made the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KeysAndValues:
        """Write every row's next column, (n, heads, 1, head_dim); what is returned ends with it."""
        box = self._rectangle
        at = box.end - self._shift
        for tensor, states in zip(self.store, (key_states, value_states), strict=True):
            tensor[: box.rows, :, at : at + 1] = states
        return self._view(box.end + 1)

    def show(self) -> None:
        """Make `keys` and `values` what is stored, for attention that only reads."""
        self.keys, self.values = self._view(self._rectangle.end)

    def _view(self, end: int) -> KeysAndValues:
        box = self._rectangle
        keys, values = (t[: box.rows, :, box.first - self._shift : end - self._shift] for t in self.store)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._rectangle.end - self._rectangle.first

    def get_max_length(self) -> int:
        return -1

    def make_room(self, rows: int, first: int, end: int) -> None:
        """See that columns `first` to `end` - 1 of `rows` rows can be written. If it raises, nothing has changed."""
        held_rows, _, columns, _ = self.store[0].shape
        if rows > held_rows or first < self._shift or end > self._shift + columns:
            self.make_anew(rows, first, end)

    def make_anew(self, rows: int, first: int, end: int) -> None:
        """New tensors for those rows and columns, with what is stored. If it raises, nothing has changed."""
        store = [self._anew(old, rows, first, end) for old in self.store]
        self.keys = self.values = None  # views, which would keep the old tensors
        self.store, self._shift = store, first

    def _anew(self, old: Tensor, rows: int, first: int, end: int) -> Tensor:
        box = self._rectangle
        needed = end - first
        columns = max(needed, min(needed + box.slack, box.room.most_columns))
        # Zeros, because attention multiplies what stands in masked columns by 0, and 0 times NaN is NaN.
        new = old.new_zeros(rows + box.room.spare_rows, old.shape[1], columns, old.shape[3])
        if box.rows:
            held = old[: box.rows, :, box.first - self._shift : box.end - self._shift]
            new[: box.rows, :, box.first - first : box.end - first] = held
        return new

    def fill(self, rows: slice, start: int, states: KeysAndValues) -> None:
        """Write one sequence's states into each of the rows, from column `start` to the end."""
        at, end = start - self._shift, self._rectangle.end - self._shift
        for tensor, mine in zip(self.store, states, strict=True):
            tensor[rows, :, :at] = 0  # see `_anew`: the row before may have left what is no number
            tensor[rows, :, at:end] = mine

    def move(self, last: int, row: int) -> None:
        end = self._rectangle.end - self._shift
        for tensor in self.store:
            tensor[row, :, :end] = tensor[last, :, :end]


class Rectangle:
    """`rows` rows whose columns are `starts[i]` to `end` - 1."""

    def __init__(self, slack: int = SLACK) -> None:
        """`slack` is 0 where no step ever writes."""
        self.slack = slack
        self.room = Room()
        self.starts: list[int] = []
        self.first = 0
        """The first column that any row uses."""
        self.end = 0
        self.layers: list[RectangleLayer] = []
        self.cache = Cache(layers=self.layers)

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """Rows times columns for which memory is held, on average where layers differ, as after a failed join."""
        return math.ceil(sum(layer.cells for layer in self.layers) / len(self.layers)) if self.layers else 0

    def join(self, layers: Iterable[KeysAndValues], length: int, rows: int = 1) -> None:
        """New last rows, each with the `length` columns that one sequence's prefill left in each layer.

        If it raises, the rows are those that were there. `layers` is read one by one, so that it may free what was
        read.
        """
        if not self.starts:
            self.clear()  # the tensors of rows that left may have room, but not at these columns
            self.end = self.first = length
        start = self.end - length
        first, total = min(self.first, start), self.rows + rows
        try:
            for index, states in enumerate(layers):
                if index == len(self.layers):
                    self.layers.append(RectangleLayer(self, states))
                self.layers[index].make_room(total, first, self.end)
                self.layers[index].fill(slice(self.rows, total), start, states)
        except BaseException:
            if not self.starts:
                self.clear()
            raise
        self.starts += [start] * rows
        self.first = first

    def leave(self, row: int) -> None:
        """Row `row` goes, and the last row takes its place."""
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
            self.starts[row] = self.starts[last]
        self.starts.pop()
        self.first = min(self.starts, default=self.end)
        if not self.starts:
            self.clear()

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Each target row becomes a copy of its source, which starts at the same column and is no target itself.

        If it raises, nothing has changed.
        """
        views = [view for layer in self.layers for view in layer._view(self.end)]
        shapes = {view.shape[1:]: view for view in views}
        moved = {shape: view.new_empty(len(sources), *shape) for shape, view in shapes.items()}
        source, target = (torch.tensor(rows, device=views[0].device) for rows in (sources, targets))
        for view in views:
            copies = moved[view.shape[1:]]
            torch.index_select(view, 0, source, out=copies)
            view.index_copy_(0, target, copies)

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        self.starts.clear()
        self.layers.clear()
        self.first = self.end = 0

    def compact(self) -> None:
        """Give back what is held beyond `room`. If it raises, no row has changed."""
        for layer in self.layers:
            layer.make_anew(self.rows, self.first, self.end)

    def make_room_for_step(self) -> None:
        """So that `end` is a column that can be written. If it raises, no row has changed."""
        for layer in self.layers:
            layer.make_room(self.rows, self.first, self.end + 1)

    def advance(self) -> None:
        """The step has written its column in every layer."""
        self.end += 1

    def mask(self, columns: int, device: torch.device) -> Tensor | None:
        """(n, `columns`) int64, 1 where a row has a token, of the columns from `first` on; None where all have."""
        if all(start == self.first for start in self.starts):
            return None
        starts = torch.tensor(self.starts, device=device)[:, None] - self.first
        return (torch.arange(columns, device=device)[None] >= starts).long()

"""Rows stay with their sequences, whatever is cut, stacked or put into another order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.model.rows import SequenceRows, failed, stack

Counts = st.lists(st.integers(0, 4), min_size=1, max_size=8)


def ragged(counts: list[int], first: int = 0) -> SequenceRows:
    """Each sequence's rows hold its number and their own place in it."""
    rows = [(first + i, place) for i, count in enumerate(counts) for place in range(count)]
    values = np.array(rows, np.float32).reshape(-1, 2)
    return SequenceRows(values, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def as_lists(rows: SequenceRows) -> list[list[list[float]]]:
    return [rows.select(i, i + 1).values.tolist() for i in range(rows.num_sequences)]


@given(Counts, st.integers(0, 8), st.integers(0, 8))
def test_selected_sequences_have_their_own_rows(counts: list[int], first: int, last: int) -> None:
    first, last = sorted((min(first, len(counts)), min(last, len(counts))))
    rows = ragged(counts)
    assert as_lists(rows.select(first, last)) == as_lists(rows)[first:last]


@given(Counts, st.integers(0, 8))
def test_stacking_what_was_cut_gives_it_back(counts: list[int], cut: int) -> None:
    cut = min(cut, len(counts))
    rows = ragged(counts)
    again = stack([rows.select(0, cut), rows.select(cut, len(counts))])
    assert as_lists(again) == as_lists(rows)


@given(Counts, st.randoms(use_true_random=False))
def test_sequences_are_put_where_the_order_says(counts: list[int], random: object) -> None:
    order = np.arange(len(counts))
    random.shuffle(order)  # type: ignore[attr-defined]
    before, after = as_lists(ragged(counts)), as_lists(ragged(counts).in_order(order))
    assert [after[place] for place in order] == before
    one_each = SequenceRows(np.arange(len(counts), dtype=np.float32)[:, None])
    assert one_each.in_order(order).values[order].tolist() == one_each.values.tolist()


def test_failed_sequences_have_no_rows_among_ragged_ones_and_zeros_among_others() -> None:
    among_ragged = stack([ragged([2, 1]), failed(2), ragged([1])])
    assert among_ragged.counts().tolist() == [2, 1, 0, 0, 1]
    among_others = stack([failed(1), SequenceRows(np.ones((2, 3), np.float32))])
    assert among_others.values.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert stack([failed(2), failed(1)]).num_sequences == 3


def test_a_row_is_found_in_its_sequence_past_empty_ones() -> None:
    assert [ragged([0, 2, 0, 1]).of_row(row) for row in range(3)] == [1, 1, 3]

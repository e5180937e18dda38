from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import InputTooLongError
from serve_app.types import Alignment, Rows, TokenBatch, concatenate


def batch(requests: Sequence[Sequence[int]], token_types: bool = False) -> TokenBatch:
    """Requests of sequences of the given lengths; token i of the batch is i."""
    lengths = [length for request in requests for length in request]
    total = sum(lengths)
    return TokenBatch(
        input_ids=np.arange(total, dtype=np.int32),
        cu_seqlens=np.array([0, *accumulate(lengths)], np.int32),
        cu_requests=np.array([0, *accumulate(map(len, requests))], np.int32),
        truncated=np.array([length > 5 for length in lengths], np.bool_),
        token_type_ids=np.ones(total, np.int32) if token_types else None,
    )


def sequences(of: TokenBatch) -> list[list[int]]:
    return [
        of.input_ids[start:stop].tolist() for start, stop in zip(of.cu_seqlens[:-1], of.cu_seqlens[1:], strict=True)
    ]


requests_of_lengths = st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=5)


@given(requests_of_lengths)
def test_counts_are_those_of_the_lists(requests: list[list[int]]) -> None:
    tokens = batch(requests)

    assert tokens.num_requests == len(requests)
    assert tokens.num_sequences == sum(map(len, requests))
    assert tokens.lengths().tolist() == [length for request in requests for length in request]
    assert [tokens.tokens_of(i) for i in range(len(requests))] == [sum(request) for request in requests]


@given(requests_of_lengths)
def test_rows_scatter_to_the_request_they_belong_to(requests: list[list[int]]) -> None:
    tokens = batch(requests)
    lengths = tokens.lengths().tolist()

    assert [lengths[tokens.sequences_of(i)] for i in range(len(requests))] == requests


@given(st.lists(st.integers(1, 9), min_size=1), st.data())
def test_select_takes_a_run_of_sequences(lengths: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(lengths) - 1))
    last = data.draw(st.integers(first + 1, len(lengths)))
    whole = batch([lengths], token_types=True)

    part = whole.select(first, last)

    assert sequences(part) == sequences(whole)[first:last]
    assert part.truncated.tolist() == whole.truncated[first:last].tolist()
    assert part.num_requests == 1
    assert part.token_type_ids is not None
    assert len(part.token_type_ids) == len(part.input_ids)


def test_select_copies_no_tokens() -> None:
    whole = batch([[3, 4]])

    assert np.shares_memory(whole.select(1, 2).input_ids, whole.input_ids)


@given(st.lists(requests_of_lengths, min_size=1, max_size=4))
def test_concatenate_keeps_sequences_and_requests_in_order(lists: list[list[list[int]]]) -> None:
    batches = [batch(requests) for requests in lists]

    joined = concatenate(batches)

    assert sequences(joined) == [sequence for one in batches for sequence in sequences(one)]
    assert joined.num_requests == sum(len(requests) for requests in lists)
    assert [joined.tokens_of(i) for i in range(joined.num_requests)] == [
        sum(request) for requests in lists for request in requests
    ]


def test_concatenate_fills_absent_token_types_with_zeros() -> None:
    joined = concatenate([batch([[2]]), batch([[3]], token_types=True)])

    assert joined.token_type_ids is not None
    assert joined.token_type_ids.tolist() == [0, 0, 1, 1, 1]


def test_concatenate_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


def test_a_failure_travels_with_its_batch() -> None:
    rows = Rows(np.zeros((0, 4), np.float32), np.zeros(1), np.zeros(1), {0: InputTooLongError("300 tokens")})

    twin = pickle.loads(pickle.dumps(rows))

    assert isinstance(twin.failures[0], InputTooLongError)
    assert twin.failures[0].message == "300 tokens"


@given(
    lengths=st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=8),
    gone=st.sets(st.integers(0, 7)),
)
def test_requests_that_are_taken_out_leave_the_others_as_they_were(lengths: list[list[int]], gone: set[int]) -> None:
    gone = {index for index in gone if index < len(lengths)}
    whole = _everything_known(batch(lengths))
    rest = whole.without(gone)
    assert rest.num_requests == whole.num_requests
    assert rest.num_sequences == sum(len(one) for i, one in enumerate(lengths) if i not in gone)
    for index in range(whole.num_requests):
        mine, before = rest.of_request(index), whole.of_request(index)
        if index in gone:
            assert mine.num_sequences == 0
            continue
        for name in ("input_ids", "cu_seqlens", "cu_requests", "truncated", "token_type_ids", "input_of"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(before, name), name)
            assert getattr(mine, name).dtype == getattr(before, name).dtype
        assert mine.alignment is not None
        assert before.alignment is not None
        for name in ("offsets", "word_ids", "text_ids"):
            np.testing.assert_array_equal(getattr(mine.alignment, name), getattr(before.alignment, name), name)


def _everything_known(tokens: TokenBatch) -> TokenBatch:
    numbers = tokens.input_ids
    return replace(
        tokens,
        truncated=np.arange(tokens.num_sequences) % 3 == 0,
        token_type_ids=numbers % 2,
        input_of=np.arange(tokens.num_sequences, dtype=np.int32),
        alignment=Alignment(np.stack([numbers, numbers + 1], axis=1), numbers, (numbers % 2).astype(np.int8)),
    )

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.model.bucketing import BucketedForward, split, split_equal
from tests.model.tiny import batch_of, load_tiny, random_sequences

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda lengths: np.array(lengths, np.int32))


def padded_tokens(lengths: np.ndarray, bucket: np.ndarray) -> int:
    return int(lengths[bucket].max()) * len(bucket)


@given(LENGTHS, st.integers(60, 400))
def test_every_sequence_is_in_one_bucket_within_the_bound(lengths: np.ndarray, bound: int) -> None:
    buckets = split(lengths, bound)
    assert sorted(np.concatenate(buckets).tolist()) == list(range(len(lengths)))
    assert all(padded_tokens(lengths, bucket) <= bound for bucket in buckets)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7).map(lambda lengths: np.array(lengths, np.int32)))
def test_no_other_cut_of_the_sorted_lengths_is_cheaper(lengths: np.ndarray) -> None:
    def cost(buckets: list[np.ndarray]) -> float:
        return sum(padded_tokens(lengths, bucket) + 64 for bucket in buckets)

    order = np.argsort(-lengths, kind="stable")
    places = range(1, len(lengths))
    every_cut = (
        [piece for piece in np.split(order, cuts) if len(piece)]
        for count in range(len(lengths))
        for cuts in combinations(places, count)
    )
    assert cost(split(lengths, 10_000)) == min(cost(buckets) for buckets in every_cut)


def test_sequence_beyond_the_bound_is_computed_alone() -> None:
    assert [bucket.tolist() for bucket in split(np.array([5, 90, 5], np.int32), 20)] == [[1], [0, 2]]


@given(LENGTHS, st.integers(1, 100))
def test_equal_buckets_hold_one_length_within_the_bound(lengths: np.ndarray, bound: int) -> None:
    buckets = split_equal(lengths, bound)
    assert sorted(np.concatenate(buckets).tolist()) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(set(lengths[bucket].tolist())) == 1
        assert len(bucket) == 1 or lengths[bucket].sum() <= bound


@pytest.mark.parametrize("equal_lengths", [False, True])
def test_hidden_states_are_those_of_each_sequence_alone(tmp_path: Path, equal_lengths: bool) -> None:
    loaded = load_tiny("roberta", tmp_path)
    forward = BucketedForward(loaded.module, loaded.device, loaded.pad_token_id, True, equal_lengths, 100)
    sequences = random_sequences([30, 7, 30, 1, 55, 7], seed=0)
    types = [[0] * len(sequence) for sequence in sequences]

    with torch.inference_mode():
        found = {}
        for part in forward(batch_of(sequences, types)):
            found.update(zip(part.rows.tolist(), part.hidden.split(part.cu_seqlens.diff().tolist()), strict=True))
        for row, sequence in enumerate(sequences):
            alone = loaded.module(input_ids=torch.tensor([sequence])).last_hidden_state[0]
            torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-4)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from serve_app.model.loader import LoadedModel
from serve_app.model.packing import CannotPackError, by_length, prepare
from serve_app.types import TokenBatch
from tests.model.tiny import batch_of, load_tiny, random_sequences, tiny_model


def hidden_of(forward: object, batch: TokenBatch) -> list[torch.Tensor]:
    [part] = forward(batch)  # type: ignore[operator]
    pieces = part.hidden.split(part.cu_seqlens.diff().tolist())
    return [pieces[place] for place in np.argsort(part.rows)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_sequences_are_put_from_short_to_long_with_their_own_tokens(lengths: list[int]) -> None:
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows, tokens = by_length(cu_seqlens)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert np.all(np.diff(np.array(lengths)[rows]) >= 0)
    expected = np.concatenate([np.arange(cu_seqlens[row], cu_seqlens[row + 1]) for row in rows])
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert", "t5", "marian", "mpnet", "gpt2"])
def test_hidden_state_of_every_token_is_that_of_its_sequence_alone(model_type: str, tmp_path: Path) -> None:
    loaded = load_tiny(model_type, tmp_path)
    sequences = random_sequences([9, 30, 2, 9, 59], seed=0)
    with torch.inference_mode():
        alone = [loaded.module(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in sequences]
        packed = hidden_of(prepare(loaded), batch_of(sequences))
    for found, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_token_types_travel_with_their_tokens(tmp_path: Path) -> None:
    loaded = load_tiny("bert", tmp_path)
    sequences = random_sequences([9, 30, 2], seed=0)
    types = [[0] * 4 + [1] * 5, [1] * 30, [0, 1]]
    with torch.inference_mode():
        alone = [
            loaded.module(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).last_hidden_state[0]
            for ids, kinds in zip(sequences, types, strict=True)
        ]
        packed = hidden_of(prepare(loaded), batch_of(sequences, types))
    for found, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "marian", "t5", "mpnet"])
def test_filler_changes_nothing(model_type: str, tmp_path: Path) -> None:
    loaded = load_tiny(model_type, tmp_path)
    batch = batch_of(random_sequences([9, 30, 2], seed=0))
    with torch.inference_mode():
        exact = hidden_of(prepare(loaded), batch)
        filled = hidden_of(prepare(loaded, padded_total=lambda total: total + 23), batch)
    for found, expected in zip(filled, exact, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "t5", "mpnet", "modernbert"])
def test_padded_call_of_a_prepared_model_is_what_it_was(model_type: str, tmp_path: Path) -> None:
    loaded = load_tiny(model_type, tmp_path)
    ids = torch.tensor(random_sequences([20, 20], seed=0))
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    with torch.inference_mode():
        before = loaded.module(input_ids=ids, attention_mask=mask).last_hidden_state
        prepare(loaded)
        after = loaded.module(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(after[0, :13], before[0, :13], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM), ("bart", AutoModelForSeq2SeqLM)],
)
def test_generate_still_works_on_a_prepared_model(model_type: str, kind: type, tmp_path: Path) -> None:
    model = kind.from_config(tiny_model(model_type).config).eval()
    ids = torch.tensor(random_sequences([7, 7], seed=0))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    before = model.generate(ids, **options)
    prepare(replace(load_tiny(model_type, tmp_path), module=model))
    assert model.generate(ids, **options).tolist() == before.tolist()


def test_model_whose_attention_cannot_be_exchanged_is_refused(tmp_path: Path) -> None:
    loaded: LoadedModel = load_tiny("rembert", tmp_path)
    with pytest.raises(CannotPackError, match="attention interface"):
        prepare(loaded)

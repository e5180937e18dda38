"""The engine on a real GPU: the same answers as on CPU, packed, without waiting for the device while launching."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.model import attention
from serve_app.model.families import PACKED
from serve_app.model.loader import LoadedModel
from serve_app.model.runner import Runner
from tests.model.tiny import MASK, batch_of, load_tiny, load_tiny_for, random_sequences

LENGTHS = [12, 3, 30, 12, 1, 59, 7, 12, 21]
WITH_BIAS = {"t5", "mt5", "umt5", "mpnet"}


def on_cuda(model_type: str, folder: Path, dtype: str) -> LoadedModel:
    return load_tiny(model_type, folder, device="cuda", dtype=dtype)


def reference(model_type: str, folder: Path, sequences: list[list[int]]) -> np.ndarray:
    return Runner(load_tiny(model_type, folder)).run(batch_of(sequences)).values


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of flash attention had."""
    calls: list[int] = []
    flash = attention._varlen
    assert flash is not None, "this torch has no varlen_attn with the keywords that are needed"

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(query))
        output: torch.Tensor = flash(query, *args, **kwargs)
        return output

    # Its keywords are inspected, so the stand-in must show them.
    counted.__signature__ = inspect.signature(flash)  # type: ignore[attr-defined]
    monkeypatch.setattr(attention, "_varlen", counted)
    return calls


@contextmanager
def no_waiting() -> Iterator[None]:
    """Anything inside that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model_type", sorted(PACKED))
def test_float32_on_the_gpu_answers_as_the_cpu_does(model_type: str, tmp_path: Path) -> None:
    sequences = random_sequences(LENGTHS, seed=1)
    expected = reference(model_type, tmp_path, sequences)
    runner = Runner(on_cuda(model_type, tmp_path, "float32"))
    assert runner.mode == "packed"
    np.testing.assert_allclose(runner.run(batch_of(sequences)).values, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model_type", sorted(PACKED))
def test_bfloat16_is_near_float32_and_independent_of_neighbours(model_type: str, tmp_path: Path) -> None:
    sequences = random_sequences(LENGTHS, seed=1)
    expected = reference(model_type, tmp_path, sequences)
    runner = Runner(on_cuda(model_type, tmp_path, "bfloat16"))
    rows = runner.run(batch_of(sequences)).values
    others = random_sequences(LENGTHS, seed=2)
    again = runner.run(batch_of([sequences[0], *others[1:]])).values

    assert runner.mode == "packed"
    cosines = (rows * expected).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.99
    np.testing.assert_array_equal(again[0], rows[0])


@pytest.mark.parametrize("model_type", sorted(PACKED - WITH_BIAS))
def test_half_precision_takes_one_kernel_a_layer(model_type: str, tmp_path: Path, kernel_calls: list[int]) -> None:
    runner = Runner(on_cuda(model_type, tmp_path, "bfloat16"))
    kernel_calls.clear()
    runner.run(batch_of(random_sequences(LENGTHS, seed=1)))
    assert kernel_calls
    assert set(kernel_calls) == {sum(LENGTHS)}


@pytest.mark.parametrize("model_type", sorted(WITH_BIAS))
def test_position_bias_goes_without_flash_attention(model_type: str, tmp_path: Path, kernel_calls: list[int]) -> None:
    runner = Runner(on_cuda(model_type, tmp_path, "bfloat16"))
    runner.run(batch_of(random_sequences(LENGTHS, seed=1)))
    assert not kernel_calls


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "modernbert", "qwen3"])
def test_launching_never_waits_for_the_device(model_type: str, tmp_path: Path) -> None:
    runner = Runner(on_cuda(model_type, tmp_path, "bfloat16"))
    runner.warm_up(500)
    batch = batch_of(random_sequences(LENGTHS, seed=1))
    expected = runner.run(batch).values
    with no_waiting():
        collect = runner.launch("pooled", batch)
    np.testing.assert_array_equal(collect().values, expected)


def test_batches_launched_behind_each_other_keep_their_own_rows(tmp_path: Path) -> None:
    runner = Runner(on_cuda("bert", tmp_path, "bfloat16"))
    batches = [batch_of(random_sequences([5 + i, 30, 9], seed=i)) for i in range(8)]
    expected = [runner.run(batch).values for batch in batches]
    collected = [collect().values for collect in [runner.launch("pooled", batch) for batch in batches]]
    np.testing.assert_array_equal(np.stack(collected), np.stack(expected))


def test_memory_of_a_batch_that_does_not_fit_is_given_back(tmp_path: Path) -> None:
    runner = Runner(on_cuda("bert", tmp_path, "float32"))
    small = batch_of(random_sequences([5], seed=0))
    expected = runner.run(small).values
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            runner.run(batch_of(random_sequences([59] * 200_000, seed=0)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() == before
    np.testing.assert_array_equal(runner.run(small).values, expected)


def test_fallback_family_runs_in_buckets(tmp_path: Path) -> None:
    sequences = random_sequences(LENGTHS, seed=1)
    expected = reference("deberta-v2", tmp_path, sequences)
    runner = Runner(on_cuda("deberta-v2", tmp_path, "float32"))
    assert runner.mode.startswith("bucketed")
    np.testing.assert_allclose(runner.run(batch_of(sequences)).values, expected, atol=1e-4, rtol=1e-3)


def test_autocast_computes_products_in_bfloat16(tmp_path: Path, kernel_calls: list[int]) -> None:
    loaded = load_tiny("bert", tmp_path, device="cuda", autocast="bfloat16")
    runner = Runner(loaded)
    assert loaded.dtype is torch.float32
    assert runner.mode == "packed"
    assert kernel_calls


WITH_HEADS = [
    ("text-classification", "bert", "sequence-logits"),
    ("text-classification", "modernbert", "sequence-logits"),
    ("text-classification", "llama", "sequence-logits"),
    ("text-classification", "bart", "sequence-logits"),
    ("text-classification", "t5", "sequence-logits"),
    ("token-classification", "roberta", "token-logits"),
    ("question-answering", "electra", "span-logits"),
    ("fill-mask", "bert", "mask-fill"),
    ("fill-mask", "distilbert", "splade"),
]
LOOKS_AT_THE_DEVICE = {"bart", "t5", "distilbert"}
"""Where the host has to wait once in a launch: for end tokens in stock code, and for SPLADE's number of weights."""


def texts_for_heads() -> list[list[int]]:
    return [[*text[:-1], 3] if len(text) < 12 else [*text[:4], MASK, *text[5:-1], 3] for text in TEXTS]


TEXTS = random_sequences(LENGTHS, seed=1)


@pytest.mark.parametrize(("task", "model_type", "head"), WITH_HEADS)
def test_heads_on_the_gpu_answer_as_on_the_cpu(task: str, model_type: str, head: str, tmp_path: Path) -> None:
    batch = batch_of(texts_for_heads())
    expected = Runner(load_tiny_for(task, model_type, tmp_path, eos_token_id=3)).run(batch, head)
    runner = Runner(load_tiny_for(task, model_type, tmp_path, device="cuda", dtype="float32", eos_token_id=3))
    found = runner.run(batch, head)
    assert runner.mode == "packed"
    assert found.counts().tolist() == expected.counts().tolist()
    np.testing.assert_allclose(found.values, expected.values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("task", "model_type", "head"), [case for case in WITH_HEADS if case[1] not in LOOKS_AT_THE_DEVICE]
)
def test_launching_a_head_never_waits_for_the_device(task: str, model_type: str, head: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny_for(task, model_type, tmp_path, device="cuda", dtype="bfloat16", eos_token_id=3))
    batch = batch_of(texts_for_heads())
    runner.run(batch, head)
    with no_waiting():
        collect = runner.launch(head, batch)
    assert collect().num_sequences == len(LENGTHS)

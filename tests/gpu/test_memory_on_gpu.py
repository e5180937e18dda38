"""A replica's token budget on a real GPU, measured in the share of memory it is given, carries what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from serve_app.config import ModelConfig, ModelSettings
from serve_app.errors import ConfigError
from serve_app.model import memory
from serve_app.model.encoding import EncodingModel
from serve_app.tasks.card import read_card
from serve_app.types import ForwardCall
from tests.model.tiny import batch_of

GIB = 1 << 30
LONGEST = 512


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def share_of(bytes_: int) -> float:
    return bytes_ / float(torch.cuda.mem_get_info()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8)
    BertModel(config).save_pretrained(made)
    return made


def started(folder: Path, fraction: float) -> EncodingModel:
    config = ModelConfig(
        name="m",
        source=str(folder),
        task="embedding",
        device="cuda",
        dtype="bfloat16",
        max_input_tokens=LONGEST,
        memory_fraction=fraction,
    )
    return EncodingModel(folder, read_card(folder, config, ""), config, mock.MagicMock())


def call(texts: int, seed: int) -> ForwardCall:
    random = np.random.default_rng(seed)
    sequences = [random.integers(5, 30_000, LONGEST).tolist() for _ in range(texts)]
    return ForwardCall(batch_of(sequences), "pooled", (None,))


async def test_a_flood_in_a_small_share_never_runs_out(folder: Path) -> None:
    """Some 300 MB beside the weights: far less than a batch of the default size takes."""
    model = started(folder, share_of(GIB // 2))
    state = model.describe()
    assert LONGEST <= state.max_batch_tokens < memory.MOST_CUDA_TOKENS
    assert state.memory["total_bytes"] == pytest.approx(GIB // 2, rel=0.01)
    before = state.memory["ooms"]
    model.start()
    try:
        alone = await model.engine.submit(call(1, seed=0))
        answers = await asyncio.gather(*(model.engine.submit(call(16, seed)) for seed in range(32)))
    finally:
        model.close()
    assert not any(answer.failures for answer in answers)
    np.testing.assert_array_equal(answers[0].values[0], alone.values[0])
    after = model.describe().memory
    assert after["ooms"] == before
    assert after["peak_allocated_bytes"] <= GIB // 2


async def test_a_whole_device_carries_the_default_batch(folder: Path) -> None:
    model = started(folder, 1.0)
    assert model.describe().max_batch_tokens == memory.MOST_CUDA_TOKENS
    model.reconfigure(ModelSettings(max_batch_tokens=4096))
    assert model.describe().max_batch_tokens == 4096


@pytest.mark.parametrize(("mib", "message"), [(20, "weights .* do not fit"), (70, "lower max_input_tokens")])
def test_a_share_that_does_not_carry_the_model_is_refused(folder: Path, mib: int, message: str) -> None:
    """The weights have 56 MiB."""
    with pytest.raises(ConfigError, match=message):
        started(folder, share_of(torch.cuda.memory_reserved() + (mib << 20)))


def test_a_full_replica_gives_unused_memory_back_when_idle(folder: Path) -> None:
    model = started(folder, 1.0)
    before = memory.read_cuda(torch.device("cuda", 0))
    keeper = memory.housekeeper(model._loaded.device).idle
    assert before.slack > 0.4
    assert keeper()
    after = memory.read_cuda(torch.device("cuda", 0))
    assert after.reserved_bytes < before.reserved_bytes
    assert not keeper()


def test_a_second_batch_takes_its_memory_from_what_the_first_has_let_go_of(folder: Path) -> None:
    """Its kernels may still run: both are on one stream, so the allocator hands the memory on at once."""
    model = started(folder, 1.0)
    tokens = call(32, seed=0).tokens
    peaks = []
    for batches in (1, 2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        launched = [model._runner.launch("pooled", tokens) for _ in range(batches)]
        peaks.append(torch.cuda.max_memory_allocated() - before)
        for collect in launched:
            collect()
    alone, together = peaks
    assert together <= 1.02 * alone

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.model import precision
from serve_app.model.precision import Precision, pick_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**keys: Any) -> ModelConfig:
    return ModelConfig(name="m", source="./m", **keys)


@pytest.fixture(params=[True, False], ids=["CPU with bfloat16", "CPU without bfloat16"])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda: request.param)
    return bool(request.param)


def test_default_is_float32_on_cpu_and_bfloat16_on_cuda(has_bfloat16: bool) -> None:
    assert pick_precision(config(), CPU) == Precision(torch.float32)
    assert pick_precision(config(), CUDA) == Precision(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_configured_dtype_is_taken_on_cuda(dtype: str) -> None:
    assert pick_precision(config(dtype=dtype), CUDA) == Precision(getattr(torch, dtype))


def test_bfloat16_that_a_cpu_would_emulate_becomes_float32_and_says_so(
    has_bfloat16: bool, caplog: pytest.LogCaptureFixture
) -> None:
    picked = pick_precision(config(dtype="bfloat16"), CPU)
    assert (picked == Precision(torch.float32)) is not has_bfloat16
    assert ("float32 is used" in caplog.text) is not has_bfloat16


def test_autocast_keeps_weights_in_float32_by_default() -> None:
    assert pick_precision(config(autocast="bfloat16"), CUDA) == Precision(torch.float32, torch.bfloat16)
    assert pick_precision(config(autocast="bfloat16", dtype="bfloat16"), CUDA) == Precision(torch.bfloat16)


def test_int8_is_for_cpu_alone() -> None:
    assert pick_precision(config(dtype="int8"), CPU) == Precision(torch.float32, int8=True)
    with pytest.raises(ConfigError, match=r"models\.m\.dtype: int8 is for CPU"):
        pick_precision(config(dtype="int8"), CUDA)


def test_autocast_is_for_gpus_alone() -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.autocast: is for GPUs"):
        pick_precision(config(autocast="bfloat16"), CPU)


def test_products_inside_the_block_have_the_autocast_type() -> None:
    x = torch.randn(3, 3)
    with Precision(torch.float32, torch.bfloat16).computing(CPU):
        assert (x @ x).dtype is torch.bfloat16
    with Precision(torch.float32).computing(CPU):
        assert (x @ x).dtype is torch.float32
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("picked", "label"),
    [
        (Precision(torch.float32), "float32"),
        (Precision(torch.bfloat16), "bfloat16"),
        (Precision(torch.float32, int8=True), "int8"),
        (Precision(torch.float32, torch.bfloat16), "float32, products in bfloat16"),
    ],
)
def test_label_names_what_is_computed(picked: Precision, label: str) -> None:
    assert picked.label == label

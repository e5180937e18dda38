from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from serve_app.model.int8 import Int8Linear, quantize
from serve_app.model.runner import Runner
from tests.model.tiny import batch_of, load_tiny, random_sequences


def test_rounding_is_within_half_a_step_of_each_row() -> None:
    rows = torch.randn(20, 50) * torch.logspace(-3, 3, 20)[:, None]
    values, scales = quantize(rows)
    assert values.dtype is torch.int8
    assert ((values * scales - rows).abs() <= scales * 0.5001).all()


def test_row_of_zeros_stays_zero() -> None:
    values, scales = quantize(torch.zeros(2, 5))
    assert not values.any()
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("shape", [(1, 5), (64,), (3, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_projection_is_near_that_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(64, 40, bias=bias)
    x = torch.randn(*shape, 64)
    with torch.inference_mode():
        expected = linear(x)
        error = (Int8Linear(linear)(x) - expected).norm() / expected.norm()
    assert error < 0.02


def test_what_a_token_becomes_does_not_depend_on_its_neighbours() -> None:
    linear = Int8Linear(nn.Linear(64, 40))
    token, giant = torch.randn(1, 64), 1000 * torch.randn(1, 64)
    with torch.inference_mode():
        assert linear(torch.cat([token, giant]))[0].equal(linear(token)[0])


@pytest.mark.parametrize("model_type", ["bert", "t5", "deberta-v2"])
def test_model_in_8_bits_answers_nearly_the_same_whoever_the_neighbours_are(model_type: str, tmp_path: Path) -> None:
    sequences = random_sequences([20, 1, 47, 20], seed=0)
    exact = Runner(load_tiny(model_type, tmp_path)).run(batch_of(sequences)).values
    rounded = Runner(load_tiny(model_type, tmp_path, dtype="int8"))

    together = rounded.run(batch_of(sequences)).values

    alone = np.concatenate([rounded.run(batch_of([sequence])).values for sequence in sequences])
    cosines = (together * exact).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.min() > 0.99
    np.testing.assert_allclose(together, alone, atol=2e-2 * np.abs(exact).max())

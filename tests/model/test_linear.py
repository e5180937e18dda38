from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

from serve_app.model.linear import Activation, OneDnnLinear, describe, padded_rows, pays, plan_swaps
from tests.model.tiny import load_tiny, random_sequences, tiny_model

FUSED = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "relu", "silu", "swish"]


@pytest.mark.parametrize("shape", [(1, 5), (7, 1), (64,), (3, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_projection_is_that_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24)
    with torch.inference_mode():
        torch.testing.assert_close(OneDnnLinear(linear, Activation())(x), linear(x), atol=1e-5, rtol=1e-5)


def test_projection_takes_views_that_are_not_contiguous() -> None:
    linear = nn.Linear(24, 40)
    x = torch.randn(24, 9).T[None]
    with torch.inference_mode():
        torch.testing.assert_close(OneDnnLinear(linear, Activation())(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_fused_activation_is_that_of_transformers(name: str) -> None:
    linear, activation = nn.Linear(24, 40), ACT2FN[name]
    described = describe(activation)
    assert described is not None
    x = 4 * torch.randn(50, 24)
    with torch.inference_mode():
        torch.testing.assert_close(OneDnnLinear(linear, described)(x), activation(linear(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gelu_10", "quick_gelu", "gelu_fast", "mish", "relu2"])
def test_activation_without_an_exact_counterpart_is_left_alone(name: str) -> None:
    assert describe(ACT2FN[name]) is None


@given(st.integers(1, 20_000))
def test_rows_are_padded_by_little(rows: int) -> None:
    padded = padded_rows(rows)
    assert rows <= padded <= max(rows + 15, rows * 1.0625)
    assert padded_rows(padded) == padded


def test_numbers_of_rows_are_few() -> None:
    assert len({padded_rows(rows) for rows in range(1, 16_385)}) <= 120


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert", "t5", "modernbert", "bart"])
def test_model_with_exchanged_projections_answers_the_same(model_type: str, tmp_path: Path) -> None:
    loaded = load_tiny(model_type, tmp_path)
    ids = torch.tensor(random_sequences([33, 33], seed=0))
    with torch.inference_mode():
        expected = loaded.module(input_ids=ids).last_hidden_state
        swaps = plan_swaps(loaded.module, lambda: loaded.module(input_ids=ids))
        for swap in swaps:
            swap.apply()
        exchanged = loaded.module(input_ids=ids).last_hidden_state
        kinds = {type(part) for part in loaded.module.modules()}
        for swap in swaps:
            swap.undo()
        undone = loaded.module(input_ids=ids).last_hidden_state

    assert OneDnnLinear in kinds
    assert nn.Linear not in kinds
    np.testing.assert_allclose(exchanged, expected, atol=1e-4 * float(expected.abs().max()))
    np.testing.assert_array_equal(undone, expected)


@pytest.mark.parametrize(
    ("model_type", "fused"), [("bert", 3), ("distilbert", 3), ("albert", 2), ("t5", 3), ("bart", 3)]
)
def test_activations_that_follow_a_projection_are_fused_once_a_layer(model_type: str, fused: int) -> None:
    model = tiny_model(model_type)
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    ids = torch.tensor(random_sequences([9], seed=0))
    with torch.inference_mode():
        swaps = plan_swaps(model, lambda: model(input_ids=ids))
    assert sum(type(swap.replacement) is nn.Identity for swap in swaps) == fused


def test_activation_of_something_else_is_not_fused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.act = nn.Linear(8, 16), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.project(x).chunk(2, dim=-1)
            return self.act(left) * right

    gated = Gated()
    with torch.inference_mode():
        swaps = plan_swaps(gated, lambda: gated(torch.randn(3, 8)))
    assert [(swap.name, type(swap.replacement)) for swap in swaps] == [("project", OneDnnLinear)]
    assert swaps[0].replacement.activation == Activation()


def test_activation_shared_by_projections_in_turn_is_not_fused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.second(self.act(self.first(x))))

    shared = Shared()
    with torch.inference_mode():
        swaps = plan_swaps(shared, lambda: shared(torch.randn(3, 8)))
    assert {swap.name for swap in swaps} == {"first", "second"}
    assert all(swap.replacement.activation == Activation() for swap in swaps)


def test_model_without_projections_has_nothing_to_gain() -> None:
    assert not pays(nn.Embedding(3, 3))

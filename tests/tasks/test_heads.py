from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve_app.tasks.heads import HEADS, cls, last_token, mean, pooled

LENGTHS = [3, 1, 4]


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cu_seqlens() -> Tensor:
    return torch.tensor([0, 3, 4, 8])


def test_mean_is_over_each_sequence_alone(hidden: Tensor, cu_seqlens: Tensor) -> None:
    expected = torch.stack([piece.mean(0) for piece in hidden.split(LENGTHS)])
    torch.testing.assert_close(mean(hidden, cu_seqlens), expected)


def test_cls_is_the_first_token(hidden: Tensor, cu_seqlens: Tensor) -> None:
    torch.testing.assert_close(cls(hidden, cu_seqlens), hidden[[0, 3, 4]])


def test_last_token_is_the_last_one(hidden: Tensor, cu_seqlens: Tensor) -> None:
    torch.testing.assert_close(last_token(hidden, cu_seqlens), hidden[[2, 3, 7]])


def test_mean_of_half_precision_is_summed_in_float32() -> None:
    hidden = torch.full((4096, 1), 1.001).to(torch.bfloat16)
    rows = mean(hidden, torch.tensor([0, 4096]))
    assert rows.dtype is torch.float32
    torch.testing.assert_close(rows, hidden[:1].float())


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_heads_give_float32_for_every_pooling(pooling: str, hidden: Tensor, cu_seqlens: Tensor) -> None:
    rows = HEADS["pooled"](pooling)(hidden.to(torch.bfloat16), cu_seqlens)
    assert rows.dtype is torch.float32
    assert rows.shape == (3, 5)


def test_one_bad_sequence_does_not_reach_its_neighbours(hidden: Tensor, cu_seqlens: Tensor) -> None:
    hidden[3] = float("nan")
    for pooling in ("mean", "cls", "lasttoken"):
        finite = pooled(pooling)(hidden, cu_seqlens).isfinite().all(dim=1)
        assert finite.tolist() == [True, False, True]

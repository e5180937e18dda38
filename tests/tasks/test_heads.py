from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve_app.tasks import heads
from serve_app.tasks.heads import cls, fill_masks, last_token, mean, pooled, splade
from serve_app.types import MaskArguments

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
    rows = pooled(pooling)(hidden.to(torch.bfloat16), cu_seqlens)
    assert rows.dtype is torch.float32
    assert rows.shape == (3, 5)


def test_one_bad_sequence_does_not_reach_its_neighbours(hidden: Tensor, cu_seqlens: Tensor) -> None:
    hidden[3] = float("nan")
    for pooling in ("mean", "cls", "lasttoken"):
        finite = pooled(pooling)(hidden, cu_seqlens).isfinite().all(dim=1)
        assert finite.tolist() == [True, False, True]


VOCABULARY = 11


@pytest.fixture
def project() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(5, VOCABULARY).requires_grad_(False)


@pytest.fixture(params=[1, 25, 1 << 25], ids=["token by token", "two tokens at a time", "at once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_CHUNK_ELEMENTS", request.param)


def test_candidates_are_those_each_request_asks_for(hidden: Tensor, project: torch.nn.Linear, chunk: None) -> None:
    asked = [MaskArguments(2), MaskArguments(5, (7, 0)), MaskArguments(2), MaskArguments(99), MaskArguments(1, (3,))]

    rows, counts = fill_masks(hidden[:5], asked, project, VOCABULARY)

    assert counts == [2, 2, 2, VOCABULARY, 1]
    probabilities = project(hidden[:5]).softmax(-1)
    for mask, (each, found) in enumerate(zip(asked, rows.split(counts), strict=True)):
        ids = torch.tensor(each.targets) if each.targets else probabilities[mask].topk(counts[mask]).indices
        torch.testing.assert_close(found, torch.stack([ids.float(), probabilities[mask, ids]], 1))


def test_no_masks_have_no_candidates(hidden: Tensor, project: torch.nn.Linear) -> None:
    rows, counts = fill_masks(hidden[:0], [], project, VOCABULARY)
    assert (rows.shape, counts) == ((0, 2), [])


def test_target_that_the_model_has_not_is_refused(hidden: Tensor, project: torch.nn.Linear) -> None:
    with pytest.raises(IndexError, match="not in the model's vocabulary"):
        fill_masks(hidden[:1], [MaskArguments(1, (VOCABULARY,))], project, VOCABULARY)


def test_splade_is_the_largest_of_each_sequence_alone(hidden: Tensor, project: torch.nn.Linear, chunk: None) -> None:
    rows, counts = splade(hidden, [2, 2, 4], project, VOCABULARY)

    for piece, found in zip(hidden.split([2, 2, 4]), rows.split(counts.tolist()), strict=True):
        weights = project(piece).relu().log1p().amax(0)
        assert found[:, 0].tolist() == weights.nonzero().flatten().tolist()
        torch.testing.assert_close(found[:, 1], weights[weights > 0])


def test_bad_token_of_splade_stays_in_its_sequence(hidden: Tensor, project: torch.nn.Linear) -> None:
    hidden[3] = float("nan")
    rows, counts = splade(hidden, [2, 2, 4], project, VOCABULARY)
    assert [bool(found.isfinite().all()) for found in rows.split(counts.tolist())] == [True, False, True]

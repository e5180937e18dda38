from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serve_app.model import linear
from serve_app.model.acceptance import accept, hidden_states, random_batch, why_refused
from serve_app.model.bucketing import BucketedForward, Part
from serve_app.model.loader import LoadedModel
from serve_app.types import TokenBatch
from tests.model.tiny import load_tiny

LENGTHS = [5, 17, 1, 9]


@pytest.fixture
def bert(tmp_path: Path) -> LoadedModel:
    return load_tiny("bert", tmp_path)


class Disturbed:
    """The right answers, plus a little of what `disturb` makes of the batch's hidden states."""

    def __init__(self, loaded: LoadedModel, strength: float, from_neighbours: bool) -> None:
        self._right = BucketedForward(loaded.module, loaded.device, loaded.pad_token_id, loaded.takes_token_types)
        self._strength = strength
        self._from_neighbours = from_neighbours

    def __call__(self, batch: TokenBatch) -> Iterator[Part]:
        for part in self._right(batch):
            extra = part.hidden.mean(0) if self._from_neighbours else torch.ones(())
            yield replace(part, hidden=part.hidden + self._strength * extra)


def refusal(loaded: LoadedModel, strength: float, from_neighbours: bool) -> str | None:
    probes = random_batch(loaded, LENGTHS)
    right = BucketedForward(loaded.module, loaded.device, loaded.pad_token_id, loaded.takes_token_types)
    with loaded.precision.computing(loaded.device):
        reference = torch.empty(sum(LENGTHS), loaded.hidden_size)
        for part in right(batch=probes):
            for row, piece in zip(part.rows, part.hidden.split(part.cu_seqlens.diff().tolist()), strict=True):
                reference[probes.cu_seqlens[row] : probes.cu_seqlens[row + 1]] = piece
        disturbed = Disturbed(loaded, strength, from_neighbours)
        return why_refused(lambda batch: hidden_states(disturbed, batch), loaded, probes, reference)


def test_right_answers_are_accepted(bert: LoadedModel) -> None:
    assert refusal(bert, 0.0, from_neighbours=False) is None


def test_wrong_answers_are_refused(bert: LoadedModel) -> None:
    assert "differs from itself alone by" in (refusal(bert, 1e-2, from_neighbours=False) or "")


def test_leak_too_small_to_show_as_an_error_is_refused(bert: LoadedModel) -> None:
    assert refusal(bert, 1e-4, from_neighbours=False) is None
    assert "with other neighbours by" in (refusal(bert, 1e-4, from_neighbours=True) or "")


def test_answers_that_are_not_numbers_are_refused(bert: LoadedModel) -> None:
    assert "inf" in (refusal(bert, float("nan"), from_neighbours=False) or "")


def test_projections_that_answer_differently_are_put_back(
    bert: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(linear.OneDnnLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.1

    monkeypatch.setattr(linear, "OneDnnLinear", Wrong)
    monkeypatch.setattr(linear, "pays", lambda module: True)

    assert accept(bert).mode == "packed"
    assert not any(isinstance(part, Wrong) for part in bert.module.modules())
    assert "keeps torch's projections" in caplog.text


@pytest.mark.parametrize("pays", [True, False])
def test_projections_are_exchanged_where_that_pays(
    bert: LoadedModel, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "pays", lambda module: pays)
    assert accept(bert).mode == "packed"
    assert any(isinstance(part, linear.OneDnnLinear) for part in bert.module.modules()) is pays


def test_random_batch_has_no_padding_in_it(bert: LoadedModel) -> None:
    batch = random_batch(bert, [50, 50])
    assert batch.lengths().tolist() == [50, 50]
    assert bert.pad_token_id not in batch.input_ids

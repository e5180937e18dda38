"""Models with heads: what comes back is what the whole stock model makes of each text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from serve_app.errors import ConfigError
from serve_app.model import linear
from serve_app.model.families import FALLBACK, PACKED
from serve_app.model.runner import Runner
from serve_app.types import MaskArguments
from tests.model.tiny import CLASSES, MASK, batch_of, load_tiny_for, random_sequences, tiny_model

LENGTHS = [12, 3, 30, 12, 2, 59, 7, 12, 21]
END = 3

ENCODERS = [
    "albert",
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
]
BUCKETED = ["deberta-v2"]

WHOLE = {
    ("text-classification", "longformer"): "its head: on its own, it differs from itself alone by",
    ("question-answering", "big_bird"): "its head: on its own, it differs from itself alone by",
}
ONE_CLASS = "head and base are one class"
WHOLE |= {("question-answering", family): ONE_CLASS for family in ("mt5", "t5", "umt5")}
"""Whose head depends on more than hidden states (global attention, a mask made of the question), or has no base."""

UNTRIED = {("question-answering", "longformer")}


def with_heads() -> list[tuple[str, str]]:
    """Every family and task that transformers has a model for."""
    tasks = ("text-classification", "token-classification", "question-answering")
    families = [(family, type(AutoConfig.for_model(family))) for family in sorted(PACKED | set(FALLBACK))]
    known = [(task, family) for task in tasks for family, kind in families if kind in CLASSES[task]._model_mapping]
    return [case for case in known if case not in UNTRIED]


def texts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    """Random tokens without specials, with an end token behind each text, as classifiers of BART and T5 want it."""
    drawn = random_sequences(lengths, seed)
    return [[token if token != MASK else 6 for token in text[:-1]] + [END] for text in drawn]


def stock_logits(model_type: str, task: str, sequences: list[list[int]], **keys: Any) -> list[np.ndarray]:
    """Each text by itself through the stock model: no padding, no neighbours, nothing of ours."""
    model = tiny_model(model_type, task=task, **keys)
    found = []
    with torch.inference_mode():
        for ids in sequences:
            output = model(input_ids=torch.tensor([ids]))
            logits = (
                torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output[0]
            )
            found.append(logits[0].numpy())
    return found


def by_sequence(rows: Any) -> list[np.ndarray]:
    return [rows.select(i, i + 1).values for i in range(rows.num_sequences)]


def check(runner: Runner, expected: list[np.ndarray], sequences: list[list[int]]) -> None:
    """Together, in other company and in halves: always the stock model's answer."""
    whole = by_sequence(runner.run(batch_of(sequences)))
    others = texts([33, 1, 8], seed=9)
    beside = by_sequence(runner.run(batch_of([others[0], *sequences[::-1], *others[1:]])))[1:-2][::-1]
    halves = by_sequence(runner.run(batch_of(sequences[:4]))) + by_sequence(runner.run(batch_of(sequences[4:])))
    for found in (whole, beside, halves):
        for one, stock in zip(found, expected, strict=True):
            # Logits of MobileBERT with random weights are in the thousands, where float32 has no 1e-4.
            np.testing.assert_allclose(one, np.atleast_2d(stock), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(("task", "model_type"), with_heads())
def test_head_answers_as_the_stock_model_does_for_each_text_alone(task: str, model_type: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny_for(task, model_type, tmp_path, eos_token_id=END))
    sequences = texts(LENGTHS)
    if (task, model_type) in WHOLE:
        assert WHOLE[task, model_type] in runner.mode
    else:
        assert (runner.mode == "packed") is (model_type in PACKED), runner.mode
        assert "its head" not in runner.mode
    check(runner, stock_logits(model_type, task, sequences, eos_token_id=END), sequences)


def test_model_that_takes_texts_of_one_form_only_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"longformer cannot be served for question-answering.*separator tokens"):
        Runner(load_tiny_for("question-answering", "longformer", tmp_path))


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering"])
def test_funnel_which_cannot_read_a_text_of_one_token_is_refused_with_the_reason(task: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"funnel cannot be served for {task}: .* RuntimeError: index .*another family"
    ):
        Runner(load_tiny_for(task, "funnel", tmp_path))


def test_classifier_that_pools_over_all_tokens_is_packed_and_right(tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("text-classification", "modernbert", tmp_path, classifier_pooling="mean"))
    sequences = texts(LENGTHS)
    assert runner.mode == "packed"
    check(runner, stock_logits("modernbert", "text-classification", sequences, classifier_pooling="mean"), sequences)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("pad_token_id", [None, END, 96])
def test_causal_classifier_reads_the_token_that_the_stock_model_reads(
    model_type: str, pad_token_id: int | None, tmp_path: Path
) -> None:
    keys = {"pad_token_id": pad_token_id}
    runner = Runner(load_tiny_for("text-classification", model_type, tmp_path, **keys))
    sequences = texts(LENGTHS)
    check(runner, stock_logits(model_type, "text-classification", sequences, **keys), sequences)


def test_heads_for_tokens_leave_a_row_for_each(tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("token-classification", "bert", tmp_path))
    assert runner.run(batch_of(texts(LENGTHS))).counts().tolist() == LENGTHS


def masked(lengths: list[int]) -> list[list[int]]:
    """Texts with no mask, one, and several."""
    sequences = texts(lengths)
    for number, text in enumerate(sequences):
        for place in range(number % 4):
            text[place * 2 % len(text)] = MASK
    return sequences


@pytest.mark.parametrize("model_type", [*ENCODERS, *BUCKETED])
def test_masks_are_filled_as_the_stock_model_does_each_with_its_requests_arguments(
    model_type: str, tmp_path: Path
) -> None:
    runner = Runner(load_tiny_for("fill-mask", model_type, tmp_path))
    sequences = masked(LENGTHS)
    asked = [MaskArguments(top_k=1 + i % 3, targets=(40, 8) if i % 2 else ()) for i in range(len(sequences))]

    rows = by_sequence(runner.run(batch_of(sequences), "mask-fill", tuple(asked)))

    for text, each, logits, found in zip(
        sequences, asked, stock_logits(model_type, "fill-mask", sequences), rows, strict=True
    ):
        places = np.flatnonzero(np.array(text) == MASK)
        probabilities = torch.tensor(logits[places]).softmax(-1)
        if each.targets:
            ids = torch.tensor(each.targets).expand(len(places), -1)
        else:
            ids = probabilities.topk(each.top_k).indices
        expected = torch.stack([ids.float(), probabilities.gather(1, ids)], -1).flatten(0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2"])
def test_splade_weights_are_the_largest_logits_of_the_stock_model(model_type: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("sparse-embedding", model_type, tmp_path))
    sequences = texts(LENGTHS)

    rows = by_sequence(runner.run(batch_of(sequences)))

    for logits, found in zip(stock_logits(model_type, "fill-mask", sequences), rows, strict=True):
        weights = np.log1p(np.maximum(logits, 0)).max(0)
        np.testing.assert_array_equal(found[:, 0], np.flatnonzero(weights))
        np.testing.assert_allclose(found[:, 1], weights[weights > 0], atol=1e-4)


def test_embedding_model_gives_pooled_rows_and_those_of_every_token(tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("embedding", "bert", tmp_path))
    sequences = texts(LENGTHS)
    tokens = runner.run(batch_of(sequences), "tokens")
    pooled = runner.run(batch_of(sequences), "pooled")
    assert tokens.counts().tolist() == LENGTHS
    np.testing.assert_allclose([one.mean(0) for one in by_sequence(tokens)], pooled.values, atol=1e-5)


def test_head_that_differs_is_refused_and_the_whole_stock_model_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_tiny_for("token-classification", "bert", tmp_path)

    class Mixes(torch.nn.Module):
        """A head that looks at neighbouring tokens."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden + hidden.roll(1, dims=1))

    loaded.model.classifier = Mixes(loaded.model.classifier)
    runner = Runner(loaded)
    sequences = texts(LENGTHS)
    assert runner.mode.startswith("bucketed by equal length: its head: on its own, it differs from itself alone by")
    assert "computed as a whole" in caplog.text
    with torch.inference_mode():
        alone = [loaded.model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    check(runner, alone, sequences)


def test_head_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("token-classification", "bert", tmp_path))
    with pytest.raises(ValueError, match="has no head pooled; it has: token-logits"):
        runner.run(batch_of(texts([5])), "pooled")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_classifier_in_low_precision_is_packed_and_near(dtype: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("text-classification", "bert", tmp_path, dtype=dtype))
    sequences = texts(LENGTHS)
    expected = np.stack(stock_logits("bert", "text-classification", sequences))
    assert runner.mode == "packed"
    rows = runner.run(batch_of(sequences)).values
    assert np.abs(rows - expected).max() < 0.1 * np.abs(expected).max()
    np.testing.assert_array_equal(runner.run(batch_of(sequences[::-1])).values[::-1], rows)


@pytest.mark.parametrize("task", ["sparse-embedding", "fill-mask"])
@pytest.mark.parametrize("exchanged", [True, False])
def test_projection_on_the_vocabulary_is_exchanged_with_the_others(
    exchanged: bool, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "pays", lambda module: exchanged)
    loaded = load_tiny_for(task, "bert", tmp_path)
    Runner(loaded)
    assert isinstance(loaded.model.get_output_embeddings(), linear.OneDnnLinear) is exchanged


def test_warm_up_asks_every_head(tmp_path: Path) -> None:
    runner = Runner(load_tiny_for("fill-mask", "bert", tmp_path))
    assert runner.heads == ("mask-fill", "splade")
    assert runner.warm_up(200) > 0
    runner.run_random([60, 60, 30])
    runner.probe()

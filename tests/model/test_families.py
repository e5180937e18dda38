from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.model.families import FALLBACK, PACKED, why_not_packed
from serve_app.model.runner import Runner
from tests.model.tiny import batch_of, load_tiny, random_sequences, tiny_model

LENGTHS = [12, 3, 30, 12, 1, 59, 7, 12, 21]


def alone(model_type: str, sequences: list[list[int]]) -> np.ndarray:
    """Each sequence by itself through the stock model: no padding, no neighbours, nothing of ours."""
    model = tiny_model(model_type)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.inference_mode():
        rows = [encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in sequences]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("model_type", sorted(PACKED))
def test_packed_family_answers_as_the_stock_model_does_for_each_text_alone(model_type: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny(model_type, tmp_path))
    sequences = random_sequences(LENGTHS, seed=1)

    rows = runner.run(batch_of(sequences)).values

    assert runner.mode == "packed"
    np.testing.assert_allclose(rows, alone(model_type, sequences), atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(PACKED))
def test_answer_of_a_packed_text_does_not_depend_on_its_neighbours(model_type: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny(model_type, tmp_path))
    [text] = random_sequences([20], seed=1)

    answers = []
    for seed, lengths in enumerate([[], [20], [20, 20, 3], [1, 59, 40, 33], [19, 21], [2] * 30]):
        neighbours = random_sequences(lengths, seed + 10)
        middle = len(neighbours) // 2
        batch = batch_of([*neighbours[:middle], text, *neighbours[middle:]])
        answers.append(runner.run(batch).values[middle])

    np.testing.assert_allclose(answers, np.broadcast_to(answers[0], (6, answers[0].size)), atol=1e-5)


PADDING_CHANGES_ANSWERS = {"convbert", "fnet", "mobilebert"}


@pytest.mark.parametrize("model_type", sorted(FALLBACK))
def test_fallback_family_is_bucketed_with_the_reason_and_answers_right(model_type: str, tmp_path: Path) -> None:
    runner = Runner(load_tiny(model_type, tmp_path))
    sequences = random_sequences(LENGTHS, seed=1)

    rows = runner.run(batch_of(sequences)).values

    way = "bucketed by equal length" if model_type in PADDING_CHANGES_ANSWERS else "bucketed"
    assert runner.mode == f"{way}: {FALLBACK[model_type]}"
    np.testing.assert_allclose(rows, alone(model_type, sequences), rtol=1e-4, atol=1e-5)


def test_model_that_differs_when_packed_is_refused_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mobilebert_in_disguise = replace(load_tiny("mobilebert", tmp_path), model_type="bert")
    runner = Runner(mobilebert_in_disguise)
    sequences = random_sequences(LENGTHS, seed=1)

    assert runner.mode.startswith("bucketed by equal length: packed, it differs from itself alone by")
    assert "is not packed" in caplog.text
    np.testing.assert_allclose(
        runner.run(batch_of(sequences)).values, alone("mobilebert", sequences), rtol=1e-4, atol=1e-5
    )


def test_no_family_is_in_both_tables() -> None:
    assert not PACKED & set(FALLBACK)


def test_unknown_family_is_not_packed() -> None:
    assert "not among those" in (why_not_packed("brand-new") or "")


@pytest.mark.parametrize(
    "model_type",
    [
        "albert",
        "bart",
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "marian",
        "modernbert",
        "mpnet",
        "roberta",
        "t5",
        "xlm-roberta",
    ],
)
def test_every_family_that_we_promise_is_in_one_of_the_tables(model_type: str) -> None:
    assert model_type in PACKED or model_type in FALLBACK


def test_documentation_has_the_same_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
    assert re.findall(r"^- `([\w-]+)`$", page, re.MULTILINE) == sorted(PACKED)
    assert dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", page, re.MULTILINE)) == dict(FALLBACK)

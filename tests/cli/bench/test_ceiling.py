from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from serve_app.cli.bench.ceiling import CeilingPlan, InProcess, direct_vectors, gather, measure_ceiling, split
from serve_app.cli.bench.children import ChildError
from serve_app.cli.bench.corpus import make_corpus
from serve_app.cli.bench.measure import cosines
from serve_app.types import TokenBatch
from tests.bench import tasks


@pytest.fixture
def plan(minilm: Path) -> CeilingPlan:
    return CeilingPlan(str(minilm), max_input_tokens=256, texts=12, seed=0, processes=1, threads=1, budgets=(256, 512))


def batch(lengths: list[int]) -> TokenBatch:
    return TokenBatch(
        input_ids=np.concatenate([np.full(length, length, np.int32) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        cu_requests=np.array([0, len(lengths)], np.int32),
        truncated=np.zeros(len(lengths), np.bool_),
    )


def test_direct_vectors_are_those_of_sentence_transformers(minilm: Path, plan: CeilingPlan) -> None:
    reference = SentenceTransformer(str(minilm), device="cpu").encode(list(make_corpus(minilm, 12).texts))

    assert cosines(direct_vectors(replace(plan, processes=2)), reference).min() > 0.9999


def test_all_texts_are_computed_and_the_best_budget_is_told(minilm: Path, plan: CeilingPlan) -> None:
    ceiling = measure_ceiling(plan)

    tokens_per_text = np.mean(make_corpus(minilm, 12).computed_tokens(256))
    assert ceiling.tokens_per_s / ceiling.texts_per_s == pytest.approx(tokens_per_text)
    assert ceiling.budget in plan.budgets
    assert 0 < ceiling.tokenize_s < ceiling.forward_s
    assert ceiling.attention


def test_a_model_that_cannot_be_loaded_is_an_error_and_not_a_hang(plan: CeilingPlan, tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="ended with status"):
        measure_ceiling(replace(plan, model_path=str(tmp_path)))


def test_gather_puts_sequences_in_order() -> None:
    sorted_batch = gather(batch([3, 1, 2]), np.array([1, 2, 0]))

    assert sorted_batch.lengths().tolist() == [1, 2, 3]
    assert sorted_batch.input_ids.tolist() == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([5, 4, 3, 2, 1], 9, [[5, 4], [3, 2, 1]]),
        ([5, 4, 3], 4, [[5], [4], [3]]),
        ([9, 1], 4, [[9], [1]]),
        ([2, 2], 100, [[2, 2]]),
    ],
)
def test_split_fills_the_budget(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert [part.lengths().tolist() for part in split(batch(lengths), budget)] == expected


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_the_ceiling_makes_the_answers_of_the_pipeline(task: str, plan: CeilingPlan, tmp_path: Path) -> None:
    tasks.make(task, tmp_path)
    found = InProcess(replace(plan, model_path=str(tmp_path), task=task, texts=6), 0).compute(512)

    texts, answers = list(make_corpus(tmp_path, 6).texts), cast("Any", found.answers)
    reference = pipeline(task, str(tmp_path), device="cpu")
    reference.tokenizer.model_max_length = 256
    if task == "text-classification":
        expected = [[(o["label"], o["score"]) for o in one] for one in reference(texts, top_k=None, truncation=True)]
        got = [[(label.label, label.score) for label in one] for one in answers]
    else:
        entities = [reference(text, aggregation_strategy="simple") for text in texts]
        expected = [[(o["entity_group"], o["score"]) for o in one] for one in entities]
        got = [[(entity.label, entity.score) for entity in one] for one in answers]
        assert sum(map(len, expected)) > 6
    assert [[name for name, _ in one] for one in got] == [[name for name, _ in one] for one in expected]
    scores = ([score for one in side for _, score in one] for side in (got, expected))
    np.testing.assert_allclose(*scores, atol=1e-4)

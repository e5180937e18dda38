"""The embedding task, its vectors against torch."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.options import EmbeddingOptions, SimilarityOptions, SparseEmbeddingOptions
from serve_app.tasks.embedding import Embedding, normalize
from serve_app.tasks.generation import GENERATING
from serve_app.tasks.registry import ANSWERED_BY, TASKS
from serve_app.tasks.sparse_embedding import SparseEmbedding
from serve_app.types import Features, FloatArray, LongTexts, ModelCard, Request, TokenizeRequest
from tests.batches import NO_TOKENS

CARD = ModelCard(
    name="tiny",
    source="some-org/tiny",
    revision="0" * 40,
    task="embedding",
    model_type="bert",
    max_input_tokens=64,
    hidden_size=8,
    pooling="mean",
    normalize=False,
    long_texts="truncate",
    prompts={"query": "query: ", "passage": "passage: "},
)
ROWS = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * 5


def request(
    options: EmbeddingOptions | SimilarityOptions | None = None,
    long_texts: LongTexts | None = None,
    stride: int | None = None,
) -> Request:
    inputs = ("a", "b", (5, 6))
    return Request("1", "tiny", "embedding", inputs, options or EmbeddingOptions(), long_texts, "left", stride)


def prompt_of(card: ModelCard, prompt_name: str | None) -> str:
    return Embedding().prepare(request(EmbeddingOptions(prompt_name=prompt_name)), card).prompt


def vectors(card: ModelCard, options: EmbeddingOptions) -> FloatArray:
    return Embedding().postprocess(request(options), card, Features(NO_TOKENS, ROWS), None)


def test_the_inputs_are_tokenized_as_they_came() -> None:
    prepared = Embedding().prepare(request(), CARD)
    assert prepared == TokenizeRequest(("a", "b", (5, 6)), "truncate", "left", prompt="", stride=CARD.stride)


@pytest.mark.parametrize("asked", get_args(LongTexts))
@pytest.mark.parametrize("configured", get_args(LongTexts))
def test_the_request_decides_about_long_texts_and_else_the_model(configured: LongTexts, asked: LongTexts) -> None:
    card = replace(CARD, long_texts=configured, stride=3)
    assert Embedding().prepare(request(long_texts=asked, stride=5), card).long_texts == asked
    assert Embedding().prepare(request(long_texts=asked, stride=5), card).stride == 5
    assert Embedding().prepare(request(long_texts=None), card).long_texts == configured
    assert Embedding().prepare(request(long_texts=None), card).stride == 3


def test_a_sparse_embedding_has_prompts_too() -> None:
    asked = replace(request(), options=SparseEmbeddingOptions("query"))
    assert SparseEmbedding().prepare(asked, CARD).prompt == "query: "
    with pytest.raises(InvalidInputError, match="passage, query"):
        SparseEmbedding().prepare(replace(asked, options=SparseEmbeddingOptions("other")), CARD)


def test_the_prompt_is_the_named_one_or_the_models_default_or_none() -> None:
    with_default = replace(CARD, default_prompt_name="passage")
    assert prompt_of(CARD, None) == ""
    assert prompt_of(CARD, "query") == "query: "
    assert prompt_of(with_default, None) == "passage: "
    assert prompt_of(with_default, "query") == "query: "


@pytest.mark.parametrize("name", ["other", ""])
def test_a_prompt_that_the_model_has_not_is_refused_with_those_it_has(name: str) -> None:
    with pytest.raises(InvalidInputError, match="it has: passage, query"):
        prompt_of(CARD, name)
    with pytest.raises(InvalidInputError, match="it has: none"):
        prompt_of(replace(CARD, prompts={}), name)


@pytest.mark.parametrize("dimensions", [0, -1, 9, 10**9])
def test_dimensions_that_the_model_has_not_are_refused(dimensions: int) -> None:
    with pytest.raises(InvalidInputError, match="dimensions: must be 1 to 8"):
        Embedding().prepare(request(EmbeddingOptions(dimensions=dimensions)), CARD)


def test_another_tasks_options_are_refused() -> None:
    with pytest.raises(MalformedRequestError, match="embedding options"):
        Embedding().prepare(request(SimilarityOptions()), CARD)


@pytest.mark.parametrize("configured", [True, False])
def test_the_request_decides_about_length_1_and_else_the_model(configured: bool) -> None:
    card = replace(CARD, normalize=configured)
    unit = torch.nn.functional.normalize(torch.from_numpy(ROWS), dim=1).numpy()
    np.testing.assert_allclose(vectors(card, EmbeddingOptions(normalize=True)), unit, atol=1e-6)
    np.testing.assert_array_equal(vectors(card, EmbeddingOptions(normalize=False)), ROWS)
    np.testing.assert_allclose(vectors(card, EmbeddingOptions()), unit if configured else ROWS, atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 3, 8])
def test_a_shortened_vector_is_cut_first_and_then_scaled(dimensions: int) -> None:
    """As sentence-transformers does with `truncate_dim` and `normalize_embeddings`."""
    cut = torch.from_numpy(ROWS[:, :dimensions])
    got = vectors(CARD, EmbeddingOptions(normalize=True, dimensions=dimensions))
    np.testing.assert_allclose(got, torch.nn.functional.normalize(cut, dim=1).numpy(), atol=1e-6)
    np.testing.assert_array_equal(vectors(CARD, EmbeddingOptions(dimensions=dimensions)), cut.numpy())


def test_a_row_of_zeros_stays_zero() -> None:
    rows = np.zeros((2, 8), np.float32)
    np.testing.assert_array_equal(normalize(rows), rows)


finite = st.floats(-1e4, 1e4, width=32)


@given(rows=arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=finite))
def test_scaling_is_torchs(rows: FloatArray) -> None:
    before = rows.copy()
    scaled = normalize(rows)
    np.testing.assert_allclose(scaled, torch.nn.functional.normalize(torch.from_numpy(rows), dim=1), atol=1e-5)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(rows, before)


def test_every_task_that_a_model_answers_is_known_under_its_own_name() -> None:
    known = {**TASKS, **GENERATING}
    assert all(known[name].name == name for answered in ANSWERED_BY.values() for name in answered)
    assert {"embedding", "similarity"} <= ANSWERED_BY["embedding"]

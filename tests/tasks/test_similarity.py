"""The similarity task, against torch's cosine similarity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.options import EmbeddingOptions, SimilarityOptions
from serve_app.tasks.embedding import Embedding, Similarity
from serve_app.types import Features, FloatArray, ModelCard, Request
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
    long_texts="error",
    prompts={"query": "query: "},
)


def request(options: SimilarityOptions | EmbeddingOptions) -> Request:
    return Request("1", "tiny", "similarity", ("a", "b", "c"), options, long_texts="truncate")


def cosines(rows: FloatArray, card: ModelCard = CARD) -> FloatArray:
    return Similarity().postprocess(request(SimilarityOptions()), card, Features(NO_TOKENS, rows), None)


values = st.floats(-1e3, 1e3, width=32)


@given(rows=arrays.arrays(np.float32, st.tuples(st.integers(2, 6), st.integers(1, 9)), elements=values))
def test_the_first_text_is_compared_with_each_of_the_others(rows: FloatArray) -> None:
    tensor = torch.from_numpy(rows)
    expected = torch.nn.functional.cosine_similarity(tensor[:1], tensor[1:], eps=1e-12)
    got = cosines(rows)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
    assert got.dtype == np.float32


def test_a_text_compared_with_itself_gives_1_whether_the_model_normalizes_or_not() -> None:
    rows = np.full((2, 8), 3, np.float32)
    for card in (CARD, replace(CARD, normalize=True)):
        assert cosines(rows, card) == pytest.approx([1], abs=1e-6)


def test_it_is_tokenized_and_computed_like_an_embedding() -> None:
    asked = Similarity().prepare(request(SimilarityOptions("query")), CARD)
    assert asked == Embedding().prepare(request(EmbeddingOptions(prompt_name="query")), CARD)
    assert (asked.prompt, asked.long_texts) == ("query: ", "truncate")
    assert Similarity.head == Embedding.head


def test_a_prompt_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="it has: query"):
        Similarity().prepare(request(SimilarityOptions("other")), CARD)


def test_another_tasks_options_are_refused() -> None:
    with pytest.raises(MalformedRequestError, match="similarity"):
        Similarity().prepare(request(EmbeddingOptions()), CARD)

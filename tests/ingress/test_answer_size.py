"""Answers that would be too large are refused, mostly before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve_app.errors import BatchTooLargeError
from serve_app.ingress.answer_size import check_after, check_before, check_generated, check_made
from serve_app.ingress.encoding import encode
from serve_app.options import (
    ClassificationOptions,
    EmbeddingOptions,
    GenerationOptions,
    QuestionAnsweringOptions,
    SparseEmbeddingOptions,
    TaskOptions,
    TokenClassificationOptions,
    TokenEmbeddingOptions,
    ZeroShotOptions,
)
from serve_app.outputs import Entity
from serve_app.types import Features, GenerationDefaults, Request, TextInput, TokenizeRequest
from tests.batches import batch_of
from tests.ingress.edge import CARD
from tests.ingress.test_backlog import SlowTiers
from tests.ingress.test_coalescer import replica
from tests.ingress.tiers import ingress_of

__all__ = ["replica"]

MOST = 100_000
CLASSIFIER = replace(CARD, labels=("a", "b", "c"))


def asked(options: TaskOptions, *inputs: TextInput) -> Request:
    task = "text-generation" if isinstance(options, GenerationOptions) else "any"
    return Request("1", "tiny", task, inputs, options)


def before(request: Request, most: int | None = MOST, **keys: Any) -> None:
    check_before(request, TokenizeRequest(request.inputs, **{"long_texts": "truncate", **keys}), CLASSIFIER, None, most)


LARGE = {
    "embeddings": asked(EmbeddingOptions(), *["a"] * 600),
    "vectors of tokens": asked(TokenEmbeddingOptions(), *["small words " * 100] * 50),
    "labels": asked(ClassificationOptions(), *["a"] * 500),
    "labels of the client": asked(ZeroShotOptions(("a" * 500,) * 20), *["a"] * 10),
    "answers": asked(QuestionAnsweringOptions(top_k=300, max_answer_len=100), ("q", "small words " * 100)),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_answer_is_refused_and_may_be_allowed(name: str) -> None:
    with pytest.raises(BatchTooLargeError, match=r"the answer would have some [0-9]+ bytes, and 100000 are allowed"):
        before(LARGE[name])
    before(LARGE[name], most=None)
    before(LARGE[name], most=100 * MOST)


SMALL = {
    "embeddings": asked(EmbeddingOptions(), *["a"] * 500),
    "short embeddings": asked(EmbeddingOptions(dimensions=2), *["a"] * 4000),
    "long texts": asked(EmbeddingOptions(), *["a" * 10_000] * 100),
    "vectors of tokens that are cut": asked(TokenEmbeddingOptions(), "small words " * 10_000),
    "few labels": asked(ClassificationOptions(top_k=1), *["a"] * 900),
    "short answers": asked(QuestionAnsweringOptions(top_k=300), ("q", "small words " * 100)),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_fits_is_not(name: str) -> None:
    before(SMALL[name])


def test_what_windows_share_is_answered_once() -> None:
    before(asked(TokenEmbeddingOptions(), "a" * 4000), long_texts="windows", stride=63)


def test_the_estimate_of_numbers_is_what_they_take_as_json() -> None:
    values = np.random.default_rng(0).standard_normal((100, 384)).astype(np.float32)
    assert len(encode(values)) == pytest.approx(values.size * 12, rel=0.1)


def test_what_the_model_left_may_be_too_large_too() -> None:
    made = Features(batch_of([100] * 10), np.zeros((1000, 16), np.float32))
    with pytest.raises(BatchTooLargeError):
        check_after(asked(TokenEmbeddingOptions()), made, MOST)
    with pytest.raises(BatchTooLargeError):
        check_after(asked(SparseEmbeddingOptions()), Features(batch_of([1]), np.zeros((5000, 2), np.float32)), MOST)
    check_after(asked(EmbeddingOptions()), made, MOST)


def test_many_entities_may_be_too_large_too() -> None:
    entity = Entity("PER", 0.5, "sarah", 0, 5)
    check_made(asked(TokenClassificationOptions()), ((entity,) * 900,), MOST)
    with pytest.raises(BatchTooLargeError):
        check_made(asked(TokenClassificationOptions()), ((entity,) * 500,) * 2, MOST)


def test_generated_texts_and_their_log_probabilities_count_as_long_as_they_may_become() -> None:
    assert CARD.max_input_tokens == 64
    check_generated(asked(GenerationOptions(max_new_tokens=50), *["a"] * 100), CARD, MOST)
    check_generated(asked(GenerationOptions(max_new_tokens=2**31 - 1), *["a"] * 100), CARD, MOST)
    with pytest.raises(BatchTooLargeError):
        check_generated(asked(GenerationOptions(max_new_tokens=50, logprobs=20), *["a"] * 100), CARD, MOST)
    short = replace(CARD, generation=GenerationDefaults(max_new_tokens=1))
    check_generated(asked(GenerationOptions(logprobs=5), *["a"] * 100), short, MOST)
    with pytest.raises(BatchTooLargeError):
        check_generated(asked(GenerationOptions(logprobs=5), *["a"] * 100), CARD, MOST)


async def test_nothing_is_computed_for_an_answer_that_is_too_large() -> None:
    tiers = SlowTiers()
    ingress = await ingress_of(tiers, max_answer_bytes=MOST)
    with pytest.raises(BatchTooLargeError):
        await ingress.answer(replace(LARGE["embeddings"], task="embedding"))
    assert not tiers.tokenize.calls

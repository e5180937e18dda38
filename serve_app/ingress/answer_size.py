"""How many bytes an answer has: told before it is computed if it follows from the request, else before it is written.

Sizes are those of JSON, about: other formats are smaller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from serve_app.errors import BatchTooLargeError
from serve_app.ingress.backlog import tokens_in
from serve_app.options import (
    ClassificationOptions,
    EmbeddingOptions,
    FillMaskOptions,
    GenerationOptions,
    QuestionAnsweringOptions,
    SparseEmbeddingOptions,
    TokenClassificationOptions,
    TokenEmbeddingOptions,
    ZeroShotOptions,
)
from serve_app.outputs import Entity, TaskOutput
from serve_app.tasks.fill_mask import masks_in
from serve_app.tasks.generation import most_new_tokens
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, ModelCard, Request, TextInput, TokenizeRequest

_NUMBER = 12
"""A float32 with its comma."""

_OBJECT = 100
"""Names and numbers of a small object: an entity, an answer, a label."""

_ENTRY = 30
"""An index and a value, with their names."""

_LOGPROB = 60

_TOKEN = 6
"""Characters of one."""


def check_before(
    request: Request, tokenize: TokenizeRequest, card: ModelCard, vocabulary: Vocabulary | None, most: int | None
) -> None:
    """Raises BatchTooLargeError if the answer is bound to have more than `most` bytes, None for no bound."""
    _check(_expected(request, tokenize, card, vocabulary), most)


def check_generated(request: Request, card: ModelCard, most: int | None) -> None:
    """Raises BatchTooLargeError if answers as long as the request and the model allow would have more than `most`."""
    options = request.options
    assert isinstance(options, GenerationOptions)
    token = _TOKEN + (1 + options.logprobs) * _LOGPROB if options.logprobs is not None else _TOKEN
    _check(len(request.inputs) * options.n * most_new_tokens(request, card, prompt_tokens=0) * token, most)


def check_after(request: Request, features: Features, most: int | None) -> None:
    """The same where what the model left tells it."""
    if isinstance(request.options, TokenEmbeddingOptions):
        _check(features.values.size * _NUMBER, most)
    elif isinstance(request.options, SparseEmbeddingOptions):
        _check(len(features.values) * _ENTRY, most)


def check_made(request: Request, output: TaskOutput, most: int | None) -> None:
    """The same where only the answer itself tells it."""
    if isinstance(request.options, TokenClassificationOptions):
        found = cast("tuple[tuple[Entity, ...], ...]", output)
        _check(sum(_OBJECT + len(entity.word) for entities in found for entity in entities), most)


def _expected(request: Request, tokenize: TokenizeRequest, card: ModelCard, vocabulary: Vocabulary | None) -> int:
    options, inputs = request.options, request.inputs
    if isinstance(options, EmbeddingOptions):
        return len(inputs) * (options.dimensions or card.hidden_size) * _NUMBER
    if isinstance(options, TokenEmbeddingOptions):
        once = tokenize if tokenize.long_texts == "truncate" else replace(tokenize, long_texts="error")
        return tokens_in(once, card) * card.hidden_size * _NUMBER // 2  # an estimate; `check_after` knows it
    if isinstance(options, ClassificationOptions):
        return len(inputs) * min(options.top_k or len(card.labels), len(card.labels)) * _OBJECT
    if isinstance(options, ZeroShotOptions):
        return len(inputs) * sum(_OBJECT + len(label) for label in options.labels)
    if isinstance(options, FillMaskOptions) and vocabulary is not None:
        each = min(options.top_k, len(options.targets or ()) or options.top_k)
        masks = masks_in(request, vocabulary)
        return sum(n * each * (_OBJECT + _characters(value)) for n, value in zip(masks, inputs, strict=True))
    if isinstance(options, QuestionAnsweringOptions):
        longest = options.max_answer_len * _TOKEN
        return sum(options.top_k * (_OBJECT + min(longest, _characters(value))) for value in inputs)
    return 0


def _characters(value: TextInput) -> int:
    """Of a text, or of the second of a pair."""
    if isinstance(value, tuple):
        return len(value[-1]) if value and isinstance(value[-1], str) else len(value) * _TOKEN
    return len(value)


def _check(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise BatchTooLargeError(
            f"the answer would have some {size} bytes, and {most} are allowed; "
            "send fewer or shorter texts, or ask for less of each"
        )

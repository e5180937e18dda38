"""Sentence embedding: one vector for each input."""

from __future__ import annotations

import numpy as np

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.options import EmbeddingOptions, SimilarityOptions
from serve_app.tasks.inputs import prompt_of, tokenize_request
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenizeRequest


class Embedding:
    """Pooled, cut to `dimensions`, then normalized.

    The order is that of Matryoshka models (https://arxiv.org/abs/2205.13147): a shortened vector is scaled to length 1
    after it was cut, so that dot products of shortened vectors are cosines. A text in windows has
    the mean of its windows' vectors, weighted by their tokens.
    """

    name = "embedding"
    head = "pooled"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = request.options
        if not isinstance(options, EmbeddingOptions):
            raise MalformedRequestError(f"task {self.name} takes embedding options")
        if options.dimensions is not None and not 1 <= options.dimensions <= card.hidden_size:
            raise InvalidInputError(f"dimensions: must be 1 to {card.hidden_size} for model {card.name}")
        return tokenize_request(request, card, prompt_of(options.prompt_name, card))

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> FloatArray:
        options, rows = request.options, over_windows(features)
        assert isinstance(options, EmbeddingOptions)
        vectors = rows if options.dimensions is None else rows[:, : options.dimensions]
        wanted = card.normalize if options.normalize is None else options.normalize
        return normalize(vectors) if wanted else vectors


class Similarity:
    """Cosine similarity of the first input with each of the others."""

    name = "similarity"
    head = "pooled"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = request.options
        if not isinstance(options, SimilarityOptions):
            raise MalformedRequestError(f"task {self.name} takes similarity options")
        return tokenize_request(request, card, prompt_of(options.prompt_name, card))

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> FloatArray:
        """Cosines (n - 1,) float32."""
        vectors = normalize(over_windows(features))
        cosines: FloatArray = vectors[1:] @ vectors[0]
        return cosines


def over_windows(features: Features) -> FloatArray:
    """One row an input (m, h): the mean of its windows' rows, each weighing as many tokens as it has."""
    if features.tokens.input_of is None:
        return features.values
    weights = features.tokens.lengths().astype(np.float32)
    starts = [sequences[0] for sequences in features.windows()]
    totals = np.add.reduceat(features.values * weights[:, None], starts)
    return (totals / np.add.reduceat(weights, starts)[:, None]).astype(np.float32, copy=False)


def normalize(vectors: FloatArray) -> FloatArray:
    """Rows (n, d) scaled to Euclidean length 1; a row of zeros stays zero, as in torch.nn.functional.normalize."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: FloatArray = (vectors / np.maximum(lengths, np.float32(1e-12))).astype(np.float32, copy=False)
    return scaled

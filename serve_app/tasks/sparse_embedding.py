"""Sparse embedding (SPLADE): a weight for each vocabulary entry that counts (https://arxiv.org/abs/2109.10086)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve_app.options import SparseEmbeddingOptions
from serve_app.outputs import SparseVector
from serve_app.tasks.inputs import options_of, prompt_of, tokenize_request
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenizeRequest


class SparseEmbedding:
    """The weight is a maximum over tokens, so that a text in windows has the maximum over its windows."""

    name = "sparse-embedding"
    head = "splade"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, SparseEmbeddingOptions)
        return tokenize_request(request, card, prompt_of(options.prompt_name, card))

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[SparseVector, ...]:
        return tuple(
            _vector([features.of_sequence(sequence) for sequence in sequences]) for sequences in features.windows()
        )


def _vector(windows: Sequence[FloatArray]) -> SparseVector:
    """From the rows (k, 2) of index and weight of each window, by index."""
    if len(windows) == 1:
        return SparseVector(windows[0][:, 0].astype(np.int32), windows[0][:, 1])
    rows = np.concatenate(windows)
    indices, place = np.unique(rows[:, 0].astype(np.int32), return_inverse=True)
    values = np.zeros(len(indices), np.float32)
    np.maximum.at(values, place.ravel(), rows[:, 1])
    return SparseVector(indices, values)

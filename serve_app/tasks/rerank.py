"""Reranking: how well each document answers a query, by a cross-encoder, which has one label."""

from __future__ import annotations

import numpy as np

from serve_app.errors import EmptyInputError, InvalidInputError
from serve_app.options import RerankOptions
from serve_app.outputs import Ranking
from serve_app.tasks.inputs import long_texts_of, options_of, prompt_of, stride_of, texts_of, truncation_side_of
from serve_app.tasks.scores import ACTIVATIONS, best_first
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenizeRequest


class Rerank:
    """The first input is the query. A document that is read in windows is as good as the best of them."""

    name = "rerank"
    head = "sequence-logits"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options_of(request, RerankOptions)
        if len(card.labels) != 1:
            raise InvalidInputError(
                f"model {card.name} has {len(card.labels)} labels: only a model with one label tells how well a "
                "document answers a query"
            )
        query, *documents = texts_of(request)
        if not documents:
            raise EmptyInputError("there are no documents beside the query")
        long_texts = long_texts_of(request, card)
        return TokenizeRequest(
            inputs=tuple((query, document) for document in documents),
            long_texts=long_texts,
            truncation_side=truncation_side_of(request, card),
            stride=stride_of(request, card),
            prompt=prompt_of(None, card),
            cut="only_second" if long_texts == "windows" else "longest_first",
        )

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> Ranking:
        """The documents by their logits, with the scores that the model's own activation makes of them."""
        starts = [sequences[0] for sequences in features.windows()]
        logits: FloatArray = np.maximum.reduceat(features.values[:, 0], starts)
        raw = options_of(request, RerankOptions).raw_scores
        return Ranking(logits if raw else ACTIVATIONS[card.activation](logits), tuple(best_first(logits)))

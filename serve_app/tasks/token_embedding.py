"""Feature extraction: the vector of each token, special tokens included, as transformers' pipeline of that name."""

from __future__ import annotations

from dataclasses import replace

from serve_app.options import TokenEmbeddingOptions
from serve_app.tasks.inputs import options_of, prompt_of, stride_of, tokenize_request
from serve_app.tasks.stitching import token_places
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenizeRequest


class TokenEmbedding:
    """A token that two windows share has the vector that it has where more stands around it."""

    name = "token-embedding"
    head = "tokens"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, TokenEmbeddingOptions)
        tokenize = tokenize_request(request, card, prompt_of(options.prompt_name, card))
        return replace(tokenize, align=tokenize.long_texts == "windows")

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[FloatArray, ...]:
        """For each input its tokens' vectors (tokens, h)."""
        stride = stride_of(request, card)
        return tuple(
            features.values[token_places(features.tokens, sequences, stride)] for sequences in features.windows()
        )

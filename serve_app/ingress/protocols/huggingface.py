"""What `huggingface_hub.InferenceClient` posts to the very URL it is given: the root, or a model's own path.

The task is told by the shape of `inputs`: an object is a comparison, anything else is embedded.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import Field

from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.envelope import ErrorBody, write_error
from serve_app.ingress.protocols.fields import (
    Body,
    Dimensions,
    EncodingFormat,
    InferenceBody,
    InputsOrSimilarity,
    Normalize,
    PromptName,
    SimilarityInputs,
    Truncate,
    TruncationDirection,
    documented,
    long_texts,
)
from serve_app.ingress.routes import COMPUTE_FAILURES, Dialect, Route
from serve_app.options import EmbeddingOptions, SimilarityOptions
from serve_app.types import Answer, Request, Side

DIALECT = Dialect("Hugging Face", write_error, ErrorBody)

T = TypeVar("T")


class Parameters(Body):
    """Options of a feature extraction; a comparison takes those that are about the texts."""

    normalize: Normalize = None
    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    prompt_name: PromptName = None
    dimensions: Dimensions = None
    encoding_format: EncodingFormat | None = Field(
        None, description="Taken for compatibility: the answer is always numbers, which is all that the client reads."
    )


class RootBody(Parameters, InferenceBody):
    """Texts to embed, or sentences to compare."""

    model_config = documented(inputs="What is Deep Learning?", normalize=True)

    inputs: InputsOrSimilarity
    parameters: Parameters | None = Field(
        None, description="The same options again, where a client nests them; those beside `inputs` win."
    )

    def to_request(self, request_id: str, model: str) -> Request:
        nested = self.parameters or Parameters()
        prompt_name = _first(self.prompt_name, nested.prompt_name)
        truncate = long_texts(_first(self.truncate, nested.truncate))
        side: Side = _first(self.truncation_direction, nested.truncation_direction) or "right"
        if isinstance(self.inputs, SimilarityInputs):
            inputs = (self.inputs.source_sentence, *self.inputs.sentences)
            return Request(request_id, model, "similarity", inputs, SimilarityOptions(prompt_name), truncate, side)
        normalize = _first(self.normalize, nested.normalize)
        options = EmbeddingOptions(normalize, _first(self.dimensions, nested.dimensions), prompt_name)
        return Request(request_id, model, "embedding", self.inputs, options, truncate, side)


def _first(outer: T | None, nested: T | None) -> T | None:
    return nested if outer is None else outer


def write_output(body: RootBody, request: Request, answer: Answer) -> bytes:
    """`[[f]]` for feature extraction, `[f]` for sentence similarity."""
    return encode(answer.output)


def routes() -> tuple[Route, ...]:
    endpoint: Inference[RootBody] = Inference(RootBody, write_output)
    return tuple(
        Route(
            "POST",
            path,
            endpoint,
            DIALECT,
            "Feature extraction or sentence similarity",
            answer=list[list[float]] | list[float],
            body=RootBody,
            failures=COMPUTE_FAILURES,
        )
        for path in ("/", "/models/{name}")
    )

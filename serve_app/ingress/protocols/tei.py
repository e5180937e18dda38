"""Text Embeddings Inference: `/embed`, `/similarity`, and the shape of its errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from serve_app.errors import ServeAppError
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.fields import (
    Body,
    Dimensions,
    InferenceBody,
    Inputs,
    PromptName,
    Text,
    Texts,
    Truncate,
    TruncationDirection,
)
from serve_app.ingress.routes import ANY_MODEL, Dialect, Route
from serve_app.ingress.statuses import ErrorKind
from serve_app.types import Answer, EmbeddingOptions, Request, SimilarityOptions


class ErrorBody(BaseModel):
    """What went wrong and what to change; `code` is stable."""

    error: str
    error_type: str
    code: str
    request_id: str


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    return {"error": error.message, "error_type": kind.tei_type, "code": error.code, "request_id": request_id}


DIALECT = Dialect("Text Embeddings Inference", write_error, ErrorBody)


class EmbedBody(InferenceBody):
    """Texts to embed."""

    inputs: Inputs
    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    prompt_name: PromptName = None
    normalize: bool | None = Field(
        True, description="Whether vectors are scaled to length 1; null: as the model's own files say."
    )
    dimensions: Dimensions = None

    def to_request(self, request_id: str, model: str) -> Request:
        return Request(
            id=request_id,
            model=model,
            task="embedding",
            inputs=self.inputs,
            options=EmbeddingOptions(self.normalize, self.dimensions, self.prompt_name),
            truncate=self.truncate,
            truncation_side=self.truncation_direction or "right",
        )


class SimilarityInputs(Body):
    """One sentence, and those to compare it with."""

    source_sentence: Text
    sentences: Texts


class SimilarityParameters(Body):
    """How the sentences are encoded."""

    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    prompt_name: PromptName = None


class SimilarityBody(InferenceBody):
    """Sentences to compare."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        parameters = self.parameters or SimilarityParameters()
        return Request(
            id=request_id,
            model=model,
            task="similarity",
            inputs=(self.inputs.source_sentence, *self.inputs.sentences),
            options=SimilarityOptions(parameters.prompt_name),
            truncate=parameters.truncate,
            truncation_side=parameters.truncation_direction or "right",
        )


def write_output(body: InferenceBody, request: Request, answer: Answer) -> bytes:
    """The numbers alone: `[[f]]` for embeddings, `[f]` for similarities."""
    return encode(answer.output)


def routes() -> tuple[Route, ...]:
    embed: Inference[EmbedBody] = Inference(EmbedBody, write_output)
    similarity: Inference[SimilarityBody] = Inference(SimilarityBody, write_output)
    return tuple(
        route
        for place in ANY_MODEL
        for route in (
            Route("POST", f"{place}/embed", embed, DIALECT, "Embed texts", list[list[float]], EmbedBody),
            Route("POST", f"{place}/similarity", similarity, DIALECT, "Compare sentences", list[float], SimilarityBody),
        )
    )

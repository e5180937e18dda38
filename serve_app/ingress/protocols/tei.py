"""Text Embeddings Inference: `/embed` and `/similarity`.

Shapes and defaults are those of https://github.com/huggingface/text-embeddings-inference (router/src/http/types.rs).
"""

from __future__ import annotations

from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.envelope import ErrorBody, write_error
from serve_app.ingress.protocols.fields import (
    Body,
    Dimensions,
    InferenceBody,
    Inputs,
    Normalize,
    PromptName,
    Similarity,
    Truncate,
    TruncationDirection,
    documented,
    long_texts,
)
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Dialect, Route
from serve_app.options import EmbeddingOptions, SimilarityOptions
from serve_app.types import Answer, Request

DIALECT = Dialect("Text Embeddings Inference", write_error, ErrorBody)


class EmbedBody(InferenceBody):
    """Texts to embed."""

    model_config = documented(inputs=["What is Deep Learning?", "What is a replica?"])

    inputs: Inputs
    normalize: Normalize = True
    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    prompt_name: PromptName = None
    dimensions: Dimensions = None

    def to_request(self, request_id: str, model: str) -> Request:
        return Request(
            id=request_id,
            model=model,
            task="embedding",
            inputs=self.inputs,
            options=EmbeddingOptions(self.normalize, self.dimensions, self.prompt_name),
            long_texts=long_texts(self.truncate),
            truncation_side=self.truncation_direction or "right",
        )


class SimilarityParameters(Body):
    """How the sentences are encoded."""

    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    prompt_name: PromptName = None


class SimilarityBody(InferenceBody):
    """Sentences to compare."""

    model_config = documented(inputs={"source_sentence": "What is Deep Learning?", "sentences": ["What is a replica?"]})

    inputs: Similarity
    parameters: SimilarityParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        parameters = self.parameters or SimilarityParameters()
        return Request(
            id=request_id,
            model=model,
            task="similarity",
            inputs=(self.inputs.source_sentence, *self.inputs.sentences),
            options=SimilarityOptions(parameters.prompt_name),
            long_texts=long_texts(parameters.truncate),
            truncation_side=parameters.truncation_direction or "right",
        )


def write_output(body: InferenceBody, request: Request, answer: Answer) -> bytes:
    """The numbers alone: `[[f]]` for embeddings, `[f]` for similarities."""
    return encode(answer.output)


def routes() -> tuple[Route, ...]:
    embed: Inference[EmbedBody] = Inference(EmbedBody, write_output)
    similarity: Inference[SimilarityBody] = Inference(SimilarityBody, write_output)
    return tuple(
        Route("POST", place + path, endpoint, DIALECT, summary, answer, endpoint.body, failures=COMPUTE_FAILURES)
        for place in ANY_MODEL
        for path, endpoint, summary, answer in (
            ("/embed", embed, "Embed texts", list[list[float]]),
            ("/similarity", similarity, "Compare one sentence with others", list[float]),
        )
    )

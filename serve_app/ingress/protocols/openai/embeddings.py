"""`/v1/embeddings`, and as in Text Embeddings Inference `/embeddings`.

Embeddings have length 1 whatever the model's files say, unless the request says otherwise, as OpenAI's and TEI's do
under this path, because clients take their dot products for cosines.
"""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.fields import EncodingFormat, InferenceBody, Inputs, Normalize, documented
from serve_app.ingress.protocols.openai.dialect import DIALECT
from serve_app.ingress.protocols.task_options import EmbeddingFields
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.types import Answer, FloatArray, Request


class EmbeddingsBody(EmbeddingFields, InferenceBody):
    """Texts to embed."""

    model_config = documented(input=["What is Deep Learning?", "What is a replica?"])

    input: Inputs
    encoding_format: EncodingFormat | None = Field(
        "float", description="Vectors as lists of numbers, or as base64 of their little-endian float32 bytes."
    )
    normalize: Normalize = True

    def to_request(self, request_id: str, model: str) -> Request:
        return self.request(request_id, model, "embedding", self.input, self.options())


class Embedding(BaseModel):
    """One input's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens computed, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The inputs' vectors, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


def write_embeddings(body: EmbeddingsBody, request: Request, answer: Answer) -> bytes:
    vectors = np.ascontiguousarray(np.asarray(answer.output, np.float32))
    rows = _base64(vectors) if body.encoding_format == "base64" else vectors
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
    return encode({"object": "list", "data": data, "model": request.model, "usage": usage})


def _base64(vectors: FloatArray) -> list[str]:
    little_endian = np.ascontiguousarray(vectors, dtype="<f4")
    return [base64.b64encode(row).decode("ascii") for row in little_endian]


def routes() -> tuple[Route, ...]:
    embeddings: Inference[EmbeddingsBody] = Inference(EmbeddingsBody, write_embeddings)
    return tuple(
        Route(
            "POST",
            f"{place}{path}",
            embeddings,
            DIALECT,
            "Embed texts",
            answer=EmbeddingList,
            body=EmbeddingsBody,
            failures=COMPUTE_FAILURES,
        )
        for place in ANY_MODEL
        for path in ("/v1/embeddings", "/embeddings")
    )

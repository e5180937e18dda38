"""OpenAI's API: `/v1/embeddings` and `/v1/models`.

Embeddings have length 1 whatever the model's files say, as OpenAI's and TEI's do under this path, because clients take
their dot products for cosines.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from serve_app.errors import ModelNotFoundError, ServeAppError
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Exchange, Reply
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.fields import Dimensions, EncodingFormat, InferenceBody, Inputs, documented
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Dialect, Route
from serve_app.ingress.statuses import ErrorKind
from serve_app.options import EmbeddingOptions
from serve_app.types import Answer, FloatArray, Request


class OpenAIError(BaseModel):
    """What is wrong and what to change."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    """OpenAI's envelope; the request id is in the header x-request-id."""

    error: OpenAIError


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    return {"error": {"message": error.message, "type": kind.openai_type, "param": None, "code": error.code}}


DIALECT = Dialect("OpenAI", write_error, OpenAIErrorBody)


class EmbeddingsBody(InferenceBody):
    """Texts to embed."""

    model_config = documented(input=["What is Deep Learning?", "What is a replica?"])

    input: Inputs
    encoding_format: EncodingFormat | None = Field(
        "float", description="Vectors as lists of numbers, or as base64 of their little-endian float32 bytes."
    )
    dimensions: Dimensions = None
    user: str | None = Field(None, description="Taken for compatibility, and not used.")

    def to_request(self, request_id: str, model: str) -> Request:
        options = EmbeddingOptions(normalize=True, dimensions=self.dimensions)
        return Request(request_id, model, "embedding", self.input, options)


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


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[Model]


def write_embeddings(body: EmbeddingsBody, request: Request, answer: Answer) -> bytes:
    vectors = np.ascontiguousarray(np.asarray(answer.output, np.float32))
    rows = _base64(vectors) if body.encoding_format == "base64" else vectors
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
    return encode({"object": "list", "data": data, "model": request.model, "usage": usage})


def _base64(vectors: FloatArray) -> list[str]:
    little_endian = np.ascontiguousarray(vectors, dtype="<f4")
    return [base64.b64encode(row).decode("ascii") for row in little_endian]


class Models:
    """`GET /v1/models` and one of them; a model's `created` is when this edge started to serve it."""

    def __init__(self) -> None:
        self._created = int(time.time())

    async def all(self, exchange: Exchange) -> Reply:
        return Reply(encode({"object": "list", "data": [self._model(name) for name in exchange.service.models]}))

    async def one(self, exchange: Exchange) -> Reply:
        name, models = exchange.path_model, exchange.service.models
        if name not in models:
            raise ModelNotFoundError(f"no model of that name is served; there is: {', '.join(models)}")
        return Reply(encode(self._model(name)))

    def _model(self, name: str | None) -> Mapping[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "serve-app"}


def routes() -> tuple[Route, ...]:
    embeddings: Inference[EmbeddingsBody] = Inference(EmbeddingsBody, write_embeddings)
    models = Models()
    return (
        *(
            Route(
                "POST",
                f"{place}/v1/embeddings",
                embeddings,
                DIALECT,
                "Embed texts",
                answer=EmbeddingList,
                body=EmbeddingsBody,
                failures=COMPUTE_FAILURES,
            )
            for place in ANY_MODEL
        ),
        Route("GET", "/v1/models", models.all, DIALECT, "List the models", answer=ModelList),
        Route("GET", "/v1/models/{name}", models.one, DIALECT, "Describe a model", answer=Model, failures=(404,)),
    )

"""A query and texts, as Text Embeddings Inference takes them at `/rerank` and at the root."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, Field, model_validator

from serve_app.errors import MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import InferenceBody, Texts
from serve_app.ingress.protocols.task_options import RerankFields
from serve_app.outputs import FloatArray
from serve_app.types import Answer, Request


class RankFields(RerankFields, InferenceBody):
    """A query, and texts to put in order by their relevance to it."""

    query: str
    texts: Texts
    return_text: bool = Field(False, description="Answer with the texts too.")

    @model_validator(mode="before")
    @classmethod
    def _has_texts(cls, value: Any) -> Any:
        if isinstance(value, dict) and "documents" in value and "texts" not in value:
            raise MalformedRequestError("`texts` is missing; if they are `documents`, post to /v1/rerank or /v2/rerank")
        return value

    def to_request(self, request_id: str, model: str) -> Request:
        return self.request(request_id, model, "rerank", (self.query, *self.texts), self.options())


class Rank(BaseModel):
    """A text's place among `texts`, and its relevance."""

    index: int
    score: float
    text: str | None = None


def write_ranks(body: RankFields, request: Request, answer: Answer) -> bytes:
    """`[{index, score, text?}]`, best first; equal ones in the order of `texts`."""
    scores = cast(FloatArray, answer.output)
    ranks: list[dict[str, Any]] = [{"index": i, "score": score} for i, score in enumerate(scores.tolist())]
    if body.return_text:
        for rank, document in zip(ranks, body.texts, strict=True):
            rank["text"] = document
    return encode(sorted(ranks, key=lambda rank: -rank["score"]))

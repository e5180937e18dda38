"""A query and texts, as Text Embeddings Inference takes them at `/rerank` and at the root."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, Field, model_validator

from serve_app.errors import MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import AnyTexts, InferenceBody, LongTextFields, check_query
from serve_app.options import RerankOptions
from serve_app.outputs import Ranking
from serve_app.types import Answer, Request


class RankFields(LongTextFields, InferenceBody):
    """A query, and texts to put in order by their relevance to it."""

    query: str = Field(description="May be empty where no text is.")
    texts: AnyTexts
    raw_scores: bool = Field(False, description="The model's outputs themselves instead of probabilities.")
    return_text: bool = Field(False, description="Answer with the texts too.")

    @model_validator(mode="before")
    @classmethod
    def _has_texts(cls, value: Any) -> Any:
        if isinstance(value, dict) and "documents" in value and "texts" not in value:
            raise MalformedRequestError("`texts` is missing; if they are `documents`, post to /v1/rerank or /v2/rerank")
        return value

    def to_request(self, request_id: str, model: str) -> Request:
        check_query(self.query, self.texts, "texts")
        return self.request(request_id, model, "rerank", (self.query, *self.texts), RerankOptions(self.raw_scores))


class Rank(BaseModel):
    """A text's place among `texts`, and its relevance."""

    index: int
    score: float
    text: str | None = None


def write_ranks(body: RankFields, request: Request, answer: Answer) -> bytes:
    """`[{index, score, text?}]`, best first; those that the model finds equally good in the order of `texts`."""
    ranking = cast(Ranking, answer.output)
    scores = ranking.scores.tolist()
    ranks: list[dict[str, Any]] = [{"index": i, "score": scores[i]} for i in ranking.order]
    if body.return_text:
        for rank in ranks:
            rank["text"] = body.texts[rank["index"]]
    return encode(ranks)

"""`/v1/rerank`, and `/v2/rerank` as Cohere's newer client posts it, in the shape that Cohere and Jina made usual."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols.fields import (
    InferenceBody,
    documented,
    items_schema,
    some_list,
    text,
)
from serve_app.ingress.protocols.openai.dialect import dialect_of
from serve_app.ingress.protocols.task_options import RerankFields
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.outputs import FloatArray
from serve_app.types import Answer, Request

DIALECT = dialect_of("documents")


def read_documents(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """A list of texts, or of objects with a `text`. Raises EmptyInputError or MalformedRequestError."""
    name = info.field_name or "documents"
    return tuple(_document(item, f"{name}[{index}]") for index, item in enumerate(some_list(value, name, info)))


def _document(value: Any, where: str) -> str:
    return text(value.get("text"), f"{where}.text") if type(value) is dict else text(value, where)


_TEXT = {"type": "string"}
_OBJECT = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}

Documents = Annotated[
    tuple[str, ...],
    PlainValidator(read_documents),
    WithJsonSchema(items_schema({"anyOf": [_TEXT, _OBJECT]})),
]


class RerankBody(RerankFields, InferenceBody):
    """A query, and documents to put in order by their relevance to it."""

    model_config = documented(query="What is Deep Learning?", documents=["Deep Learning is…", "A cheese."], top_n=1)

    query: str
    documents: Documents
    top_n: int | None = Field(None, ge=1, description="Only so many documents, the best; all where it is left out.")
    return_documents: bool | None = Field(None, description="Answer with the documents too.")

    def to_request(self, request_id: str, model: str) -> Request:
        return self.request(request_id, model, "rerank", (self.query, *self.documents), self.options())


class Document(BaseModel):
    """A document as it was sent."""

    text: str


class RerankResult(BaseModel):
    """A document's place among `documents`, and its relevance."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankUsage(BaseModel):
    """Tokens computed, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class RerankList(BaseModel):
    """The documents, best first; equal ones in the order in which they were sent."""

    id: str
    model: str
    results: list[RerankResult]
    usage: RerankUsage


def write_ranks(body: RerankBody, request: Request, answer: Answer) -> bytes:
    scores = cast(FloatArray, answer.output).tolist()
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results = [_result(body, index, scores[index]) for index in best]
    usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
    return encode({"id": f"rerank-{request.id}", "model": request.model, "results": results, "usage": usage})


def _result(body: RerankBody, index: int, score: float) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": score}
    return {**result, "document": {"text": body.documents[index]}} if body.return_documents else result


def routes() -> tuple[Route, ...]:
    endpoint: Inference[RerankBody] = Inference(RerankBody, write_ranks)
    return tuple(
        Route(
            "POST",
            f"{place}/{version}/rerank",
            endpoint,
            DIALECT,
            "Order documents by relevance",
            answer=RerankList,
            body=RerankBody,
            failures=COMPUTE_FAILURES,
        )
        for place in ANY_MODEL
        for version in ("v1", "v2")
    )

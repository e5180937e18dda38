"""A query and the texts to put in order, as Text Embeddings Inference, Cohere and those that follow them take them.

`texts` are answered in the shape of Text Embeddings Inference, `documents` in that of Cohere, Jina and vLLM, whose
clients read no other.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator

from serve_app.errors import MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import NULL, InferenceBody, items_schema, read_texts, some_list, text
from serve_app.ingress.protocols.task_options import RerankFields
from serve_app.outputs import Ranking
from serve_app.types import Answer, Request


def read_documents(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """A list of texts, or of objects with a `text`. Raises EmptyInputError or MalformedRequestError."""
    name = info.field_name or "documents"
    return tuple(_document(item, f"{name}[{index}]") for index, item in enumerate(some_list(value, name, info)))


def _document(value: Any, where: str) -> str:
    return text(value.get("text"), f"{where}.text") if type(value) is dict else text(value, where)


_TEXT = {"type": "string"}
_OBJECT = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}
_DOCUMENTS_SCHEMA = items_schema({"anyOf": [_TEXT, _OBJECT]})

Documents = Annotated[tuple[str, ...], PlainValidator(read_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)]


class QueryFields(RerankFields, InferenceBody):
    """A query, and what is wanted of the documents or texts that are sent with it."""

    query: str
    top_n: int | None = Field(None, ge=1, description="Only so many documents, the best; all where it is left out.")
    return_documents: bool | None = Field(None, description="Answer with the documents too.")

    @property
    def wants_texts(self) -> bool:
        """Whether the answer is to repeat the texts."""
        return bool(self.return_documents)


class RankFields(QueryFields):
    """A query, and texts to put in order by their relevance to it."""

    texts: Annotated[
        tuple[str, ...] | None, PlainValidator(read_texts), WithJsonSchema(items_schema({"type": "string"}))
    ] = None
    documents: Annotated[tuple[str, ...] | None, PlainValidator(read_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)] = (
        Field(None, description="In the place of `texts`; the answer is then that of /v1/rerank.")
    )
    return_text: bool = Field(False, description="The same as `return_documents`.")

    @property
    def wants_texts(self) -> bool:
        return self.return_text or bool(self.return_documents)

    @model_validator(mode="after")
    def _has_either(self) -> RankFields:
        if self.texts is None and self.documents is None:
            raise MalformedRequestError("`texts` is missing; send `texts`, or `documents` as to /v1/rerank")
        if self.texts is not None and self.documents is not None:
            raise MalformedRequestError("`texts` and `documents` are both there; send either")
        return self

    def to_request(self, request_id: str, model: str) -> Request:
        texts = self.documents if self.texts is None else self.texts
        assert texts is not None, "one of them is there"
        return self.request(request_id, model, "rerank", (self.query, *texts), self.options())


def ranked(**example: Any) -> dict[str, Any]:
    """What the schema of a body with RankFields has beside its fields."""
    either = [{"required": ["texts"]}, {"required": ["documents"]}]
    return {"examples": [example], "oneOf": either, "additionalProperties": NULL}


class Rank(BaseModel):
    """A text's place among `texts`, and its relevance."""

    index: int
    score: float
    text: str | None = None


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


def write_ranks(body: RankFields, request: Request, answer: Answer) -> bytes:
    """`[{index, score, text?}]` of `texts`, best first; of `documents` as `write_results`.

    Those that the model finds equally good stand in the order of the request.
    """
    if body.texts is None:
        return write_results(body, request, answer)
    ranks: list[dict[str, Any]] = [{"index": index, "score": score} for index, score in _best(body, answer)]
    if body.wants_texts:
        for rank in ranks:
            rank["text"] = body.texts[rank["index"]]
    return encode(ranks)


def write_results(body: QueryFields, request: Request, answer: Answer) -> bytes:
    """`{results: [{index, relevance_score, document?}], …}`, best first."""
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in _best(body, answer)]
    if body.wants_texts:
        _, *documents = request.inputs
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
    return encode({"id": f"rerank-{request.id}", "model": request.model, "results": results, "usage": usage})


def _best(body: QueryFields, answer: Answer) -> list[tuple[int, float]]:
    """Index and score of those that are wanted, best first."""
    ranking = cast(Ranking, answer.output)
    scores: list[float] = ranking.scores.tolist()
    return [(index, scores[index]) for index in ranking.order[: body.top_n]]

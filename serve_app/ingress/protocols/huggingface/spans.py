"""Tasks whose answers are places in the text: entities, masks and answers to questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import BaseModel, PlainValidator, WithJsonSchema

from serve_app.errors import EmptyInputError, MalformedRequestError
from serve_app.ingress.protocols.fields import WORD_SCHEMA, LongTextFields, documented, kind, text
from serve_app.ingress.protocols.huggingface.body import (
    Several,
    SeveralReader,
    TaskBody,
    Texts,
    several_schema,
)
from serve_app.ingress.protocols.task_options import EntityFields, EntityTextFields, FillMaskFields, QuestionFields
from serve_app.options import QuestionAnsweringOptions, TokenClassificationOptions
from serve_app.outputs import Entity, Fill, Span
from serve_app.types import Answer, Request, TextPair


class EntityBody(BaseModel):
    """An entity; `entity` and `index` where tokens are not aggregated, else `entity_group`."""

    entity: str | None = None
    entity_group: str | None = None
    index: int | None = None
    score: float
    word: str
    start: int
    end: int


class TokenClassificationBody(EntityTextFields, TaskBody):
    """Texts to find entities in."""

    model_config = documented(
        inputs="My name is Sarah and I live in London", parameters={"aggregation_strategy": "simple"}
    )

    inputs: Texts
    parameters: EntityFields | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or EntityFields()
        texts = self.over(chosen)
        return texts.request(request_id, model, "token-classification", self.inputs.values, chosen.options())

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[{entity or entity_group, score, word, start, end}]`, in a list where `inputs` is one."""
        key = "entity" if cast(TokenClassificationOptions, request.options).aggregation == "none" else "entity_group"
        found = cast("Sequence[Sequence[Entity]]", answer.output)
        return self.inputs.encode([[_entity(each, key) for each in entities] for entities in found])


def _entity(entity: Entity, key: str) -> dict[str, Any]:
    index = {"index": entity.index} if key == "entity" else {}
    place = {"word": entity.word, "start": entity.start, "end": entity.end}
    return {key: entity.label, "score": entity.score, **index, **place}


class FillBody(BaseModel):
    """What may stand in a mask's place."""

    score: float
    token: int
    token_str: str
    sequence: str


class FillMaskBody(LongTextFields, TaskBody):
    """Texts with masks to fill."""

    model_config = documented(inputs="Paris is the [MASK] of France.", parameters={"top_k": 3})

    inputs: Texts
    parameters: FillMaskFields | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or FillMaskFields()
        return self.over(chosen).request(request_id, model, "fill-mask", self.inputs.values, chosen.options())

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[{score, token, token_str, sequence}]`, a list of these for several masks, in a list for several texts."""
        found = cast("Sequence[Sequence[Sequence[Fill]]]", answer.output)
        return self.inputs.encode([_masks(masks) for masks in found])


def _masks(masks: Sequence[Sequence[Fill]]) -> list[Any]:
    written = [[_fill(fill) for fill in fills] for fills in masks]
    return written[0] if len(written) == 1 else written


def _fill(fill: Fill) -> dict[str, Any]:
    return {"score": fill.score, "token": fill.token, "token_str": fill.token_str, "sequence": fill.sequence}


class SpanBody(BaseModel):
    """An answer and its place in the context."""

    score: float
    start: int
    end: int
    answer: str


def question(value: Any, where: str) -> TextPair:
    """`{"question": …, "context": …}`. Raises EmptyInputError or MalformedRequestError."""
    if type(value) is not dict:
        raise MalformedRequestError(f"`{where}` is {kind(value)}; send an object of question and context")
    for key in ("question", "context"):
        if key not in value:
            raise MalformedRequestError(f"`{where}.{key}` is missing")
    return _some_text(value["question"], f"{where}.question"), _some_text(value["context"], f"{where}.context")


def _some_text(value: Any, where: str) -> str:
    """The pipeline, too, refuses a question or a context that is empty."""
    if not text(value, where):
        raise EmptyInputError(f"`{where}` is an empty text; leave it out")
    return str(value)


_QUESTION = {
    "type": "object",
    "properties": {"question": WORD_SCHEMA, "context": WORD_SCHEMA},
    "required": ["question", "context"],
}

Questions = Annotated[
    Several,
    PlainValidator(SeveralReader(question)),
    WithJsonSchema(several_schema(_QUESTION, "A question and the text that has its answer, or a list of these.")),
]


class QuestionAnsweringBody(LongTextFields, TaskBody):
    """Questions about texts."""

    model_config = documented(inputs={"question": "Where do I live?", "context": "My name is Sarah, I live in London."})

    inputs: Questions
    parameters: QuestionFields | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or QuestionFields()
        texts = self.over(chosen)
        return texts.request(request_id, model, "question-answering", self.inputs.values, chosen.options())

    def write(self, request: Request, answer: Answer) -> bytes:
        """`{answer, score, start, end}`, a list of these where `top_k` is above 1, in a list for several questions."""
        several = cast(QuestionAnsweringOptions, request.options).top_k > 1
        found = cast("Sequence[Sequence[Span]]", answer.output)
        return self.inputs.encode([_spans(spans) if several else _best(spans) for spans in found])


def _spans(spans: Sequence[Span]) -> list[dict[str, Any]]:
    return [_span(span) for span in spans]


def _best(spans: Sequence[Span]) -> dict[str, Any]:
    return _span(spans[0] if spans else Span("", 0.0, 0, 0))


def _span(span: Span) -> dict[str, Any]:
    return {"score": span.score, "start": span.start, "end": span.end, "answer": span.answer}

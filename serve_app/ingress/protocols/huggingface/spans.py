"""Tasks whose answers are places in the text: entities, masks and answers to questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import MalformedRequestError
from serve_app.ingress.protocols.fields import (
    TEXT_SCHEMA,
    TEXTS_SCHEMA,
    LongTextFields,
    Stride,
    documented,
    kind,
    texts,
)
from serve_app.ingress.protocols.huggingface.body import (
    AnyTexts,
    Several,
    SeveralReader,
    TaskBody,
    several_schema,
    some_text,
)
from serve_app.options import FillMaskOptions, QuestionAnsweringOptions, TokenClassificationOptions
from serve_app.outputs import Entity, Fill, Span
from serve_app.types import Answer, LongTexts, Request, TextPair

_MOST = 100_000
Tokens = Annotated[int | None, Field(ge=1, le=_MOST)]


class EntityBody(BaseModel):
    """An entity; `entity` and `index` where tokens are not aggregated, else `entity_group`."""

    entity: str | None = None
    entity_group: str | None = None
    index: int | None = None
    score: float
    word: str
    start: int
    end: int


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) and value.isupper() else value


Strategy = Annotated[Literal["none", "simple", "first", "average", "max"], BeforeValidator(_lower)]
"""The pipeline takes them in capitals, too."""


class EntityTexts(LongTextFields):
    """What becomes of long texts; as in the pipeline, a stride asks for windows."""

    stride: Stride = Field(
        None, description="Tokens that neighbouring windows share. Given alone, it asks for windows, as the pipeline's."
    )

    def choice(self) -> LongTexts | None:
        chosen = super().choice()
        return "windows" if chosen is None and self.stride is not None else chosen


class EntityParameters(EntityTexts):
    """As of transformers' pipeline."""

    aggregation_strategy: Strategy | None = Field(
        None, description="How tokens become entities; none where it is left out."
    )
    ignore_labels: Annotated[list[str], Field(max_length=1000, fail_fast=True)] | None = Field(
        None, description="Labels to leave out; O where it is left out."
    )


class TokenClassificationBody(EntityTexts, TaskBody):
    """Texts to find entities in."""

    model_config = documented(
        inputs="My name is Sarah and I live in London", parameters={"aggregation_strategy": "simple"}
    )

    inputs: AnyTexts
    parameters: EntityParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or EntityParameters()
        ignored = ("O",) if chosen.ignore_labels is None else tuple(chosen.ignore_labels)
        options = TokenClassificationOptions(chosen.aggregation_strategy or "none", ignored)
        return self.over(chosen).request(request_id, model, "token-classification", self.inputs.values, options)

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


def read_targets(value: Any, info: ValidationInfo) -> tuple[str, ...] | None:
    """A text or a list of texts. Raises EmptyInputError or MalformedRequestError."""
    if value is None:
        return None
    return texts([value] if type(value) is str else value, info.field_name or "targets", info)


Targets = Annotated[
    tuple[str, ...] | None,
    PlainValidator(read_targets),
    WithJsonSchema(
        {
            "description": "Score these alone, instead of the whole vocabulary: a text, or a list of texts.",
            "anyOf": [TEXT_SCHEMA, TEXTS_SCHEMA, {"type": "null"}],
        }
    ),
]


class FillMaskParameters(LongTextFields):
    """As of transformers' pipeline."""

    top_k: int | None = Field(None, ge=1, description="So many tokens for each mask; 5 where it is left out.")
    targets: Targets = None


class FillMaskBody(LongTextFields, TaskBody):
    """Texts with masks to fill."""

    model_config = documented(inputs="Paris is the [MASK] of France.", parameters={"top_k": 3})

    inputs: AnyTexts
    parameters: FillMaskParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or FillMaskParameters()
        options = FillMaskOptions(5 if chosen.top_k is None else chosen.top_k, chosen.targets)
        return self.over(chosen).request(request_id, model, "fill-mask", self.inputs.values, options)

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
    return some_text(value["question"], f"{where}.question"), some_text(value["context"], f"{where}.context")


_QUESTION = {
    "type": "object",
    "properties": {"question": TEXT_SCHEMA, "context": TEXT_SCHEMA},
    "required": ["question", "context"],
}

Questions = Annotated[
    Several,
    PlainValidator(SeveralReader(question)),
    WithJsonSchema(several_schema(_QUESTION, "A question and the text that has its answer, or a list of these.")),
]


class QuestionParameters(LongTextFields):
    """As of transformers' pipeline, lengths in tokens."""

    top_k: int | None = Field(None, ge=1, le=_MOST, description="So many answers; above 1 the answer is a list.")
    doc_stride: int | None = Field(None, ge=0, le=_MOST, description="Tokens that neighbouring windows share.")
    max_answer_len: Tokens = None
    max_question_len: Tokens = None
    max_seq_len: Tokens = None
    handle_impossible_answer: bool | None = Field(None, description="Whether an empty answer is one of the answers.")
    align_to_words: bool | None = Field(None, description="Whether answers are widened to words; true where left out.")


class QuestionAnsweringBody(LongTextFields, TaskBody):
    """Questions about texts."""

    model_config = documented(inputs={"question": "Where do I live?", "context": "My name is Sarah, I live in London."})

    inputs: Questions
    parameters: QuestionParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or QuestionParameters()
        options = QuestionAnsweringOptions(
            top_k=chosen.top_k or 1,
            doc_stride=chosen.doc_stride,
            max_seq_len=chosen.max_seq_len,
            max_answer_len=chosen.max_answer_len or QuestionAnsweringOptions().max_answer_len,
            max_question_len=chosen.max_question_len or QuestionAnsweringOptions().max_question_len,
            handle_impossible_answer=bool(chosen.handle_impossible_answer),
            align_to_words=chosen.align_to_words is not False,
        )
        return self.over(chosen).request(request_id, model, "question-answering", self.inputs.values, options)

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

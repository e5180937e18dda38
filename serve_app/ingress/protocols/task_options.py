"""The options of every task, with their names on the wire: the one table that all protocols draw from.

A protocol adds the names that it alone has for the same options, and what is about its answers' shape. What neither of
them has is refused by name (`protocols.unknown`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.ingress.protocols.fields import (
    WORD_SCHEMA,
    WORDS_SCHEMA,
    Dimensions,
    HypothesisTemplate,
    LongTextFields,
    Normalize,
    PromptName,
    Stride,
    words,
)
from serve_app.ingress.protocols.generation import GenerationFields, Seq2SeqFields
from serve_app.ingress.protocols.unknown import refusal
from serve_app.options import (
    DEFAULT_TEMPLATE,
    ClassificationOptions,
    EmbeddingOptions,
    FillMaskOptions,
    QuestionAnsweringOptions,
    RerankOptions,
    TokenClassificationOptions,
    ZeroShotOptions,
)
from serve_app.types import LongTexts

_MOST = 100_000


def _tokens(description: str) -> Any:
    return Field(None, ge=1, le=_MOST, description=description)


class PromptFields(LongTextFields):
    """How texts are encoded."""

    prompt_name: PromptName = None


class EmbeddingFields(PromptFields):
    """And what is made of their vectors."""

    normalize: Normalize = None
    dimensions: Dimensions = None

    def options(self) -> EmbeddingOptions:
        return EmbeddingOptions(self.normalize, self.dimensions, self.prompt_name)


class ClassificationFields(LongTextFields):
    """Of the model's own labels."""

    top_k: int | None = Field(None, ge=1, description="Only so many labels, the best; all where it is left out.")
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = Field(
        None, description="What makes scores of the model's outputs; as its configuration says where left out."
    )
    raw_scores: bool | None = Field(
        None, description="The model's outputs themselves instead of probabilities, unless `function_to_apply` says it."
    )
    over_windows: Literal["max", "mean"] = Field(
        "mean", description="How the scores of a long text's windows become the text's."
    )

    def options(self) -> ClassificationOptions:
        function = self.function_to_apply or ("none" if self.raw_scores else None)
        return ClassificationOptions(self.top_k, function, self.over_windows)


class RerankFields(LongTextFields):
    """Of the relevance of texts to a query."""

    raw_scores: bool | None = Field(None, description="The model's outputs themselves instead of probabilities.")

    def options(self) -> RerankOptions:
        return RerankOptions(bool(self.raw_scores))


class ZeroShotFields(LongTextFields):
    """Of labels that the client names."""

    multi_label: bool | None = Field(None, description="Whether several candidate labels may be true at once.")
    hypothesis_template: HypothesisTemplate = DEFAULT_TEMPLATE

    def options(self, labels: tuple[str, ...]) -> ZeroShotOptions:
        """Raises InvalidInputError for a template without a place for the label."""
        return ZeroShotOptions(labels, bool(self.multi_label), self.hypothesis_template)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) and value.isupper() else value


Strategy = Annotated[Literal["none", "simple", "first", "average", "max"], BeforeValidator(_lower)]
"""The pipeline takes them in capitals, too."""


class EntityTextFields(LongTextFields):
    """What becomes of long texts; as in the pipeline, a stride asks for windows."""

    stride: Stride = Field(
        None, description="Tokens that neighbouring windows share. Given alone, it asks for windows, as the pipeline's."
    )

    def choice(self) -> LongTexts | None:
        chosen = super().choice()
        return "windows" if chosen is None and self.stride is not None else chosen


class EntityFields(EntityTextFields):
    """Of entities, as of transformers' pipeline."""

    aggregation_strategy: Strategy | None = Field(
        None, description="How tokens become entities; none where it is left out."
    )
    ignore_labels: Annotated[list[str], Field(max_length=1000, fail_fast=True)] | None = Field(
        None, description="Labels to leave out; O where it is left out."
    )

    def options(self) -> TokenClassificationOptions:
        ignored = ("O",) if self.ignore_labels is None else tuple(self.ignore_labels)
        return TokenClassificationOptions(self.aggregation_strategy or "none", ignored)


def read_targets(value: Any, info: ValidationInfo) -> tuple[str, ...] | None:
    """A text or a list of texts. Raises EmptyInputError or MalformedRequestError."""
    if value is None:
        return None
    return words([value] if type(value) is str else value, info.field_name or "targets", info)


Targets = Annotated[
    tuple[str, ...] | None,
    PlainValidator(read_targets),
    WithJsonSchema(
        {
            "description": "Score these alone, instead of the whole vocabulary: a text, or a list of texts.",
            "anyOf": [WORD_SCHEMA, WORDS_SCHEMA, {"type": "null"}],
        }
    ),
]


class FillMaskFields(LongTextFields):
    """Of masks, as of transformers' pipeline."""

    top_k: int | None = Field(None, ge=1, description="So many tokens for each mask; 5 where it is left out.")
    targets: Targets = None

    def options(self) -> FillMaskOptions:
        return FillMaskOptions(FillMaskOptions().top_k if self.top_k is None else self.top_k, self.targets)


class QuestionFields(LongTextFields):
    """Of questions, as of transformers' pipeline, lengths in tokens."""

    top_k: int | None = Field(None, ge=1, le=_MOST, description="So many answers; above 1 the answer is a list.")
    doc_stride: int | None = Field(None, ge=0, le=_MOST, description="Tokens that neighbouring windows share.")
    max_answer_len: int | None = _tokens("Longest answer; 15 where it is left out.")
    max_question_len: int | None = _tokens("Longest question, beyond which it is cut; 64 where it is left out.")
    max_seq_len: int | None = _tokens("Longest window, question included; 384 or what the model takes.")
    handle_impossible_answer: bool | None = Field(None, description="Whether an empty answer is one of the answers.")
    align_to_words: bool | None = Field(None, description="Whether answers are widened to words; true where left out.")

    def options(self) -> QuestionAnsweringOptions:
        usual = QuestionAnsweringOptions()
        return QuestionAnsweringOptions(
            top_k=self.top_k or usual.top_k,
            doc_stride=self.doc_stride,
            max_seq_len=self.max_seq_len,
            max_answer_len=self.max_answer_len or usual.max_answer_len,
            max_question_len=self.max_question_len or usual.max_question_len,
            handle_impossible_answer=bool(self.handle_impossible_answer),
            align_to_words=self.align_to_words is not False,
        )


OPTIONS: Mapping[str, type[LongTextFields]] = {
    "embedding": EmbeddingFields,
    "similarity": PromptFields,
    "token-embedding": PromptFields,
    "sparse-embedding": PromptFields,
    "text-classification": ClassificationFields,
    "rerank": RerankFields,
    "zero-shot-classification": ZeroShotFields,
    "token-classification": EntityFields,
    "fill-mask": FillMaskFields,
    "question-answering": QuestionFields,
    "text-generation": GenerationFields,
    "text2text-generation": Seq2SeqFields,
    "summarization": Seq2SeqFields,
    "translation": Seq2SeqFields,
}
"""By task."""


def refuse_others(chosen: LongTextFields, task: str, *also: str, part: str = "") -> None:
    """Raises InvalidInputError if `chosen`, which serves several tasks, has an option that is not of `task`.

    `also` are fields that are no options. What a field is anyway is accepted.
    """
    own = {*OPTIONS[task].model_fields, *also}
    fields = type(chosen).model_fields
    for name in sorted(fields.keys() - own):
        if getattr(chosen, name) not in (None, fields[name].default):
            raise refusal(name, own, part)

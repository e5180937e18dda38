"""What the `parameters` of a request may say, task by task. Over gRPC each is one bool, number or text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve_app.ingress.protocols.fields import (
    Dimensions,
    HypothesisTemplate,
    LongTextFields,
    Normalize,
    PromptName,
)
from serve_app.ingress.protocols.generation import GenerateFields
from serve_app.options import DEFAULT_TEMPLATE, GenerationOptions

_MOST = 100_000
Count = Annotated[int | None, Field(ge=1, le=_MOST)]


class EmbeddingParameters(LongTextFields):
    """Of embedding."""

    normalize: Normalize = None
    prompt_name: PromptName = None
    dimensions: Dimensions = None


class PromptParameters(LongTextFields):
    """Of similarity, token embedding and sparse embedding."""

    prompt_name: PromptName = None


class ClassificationParameters(LongTextFields):
    """Of text classification."""

    top_k: Count = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    over_windows: Literal["max", "mean"] = "mean"


class RerankParameters(LongTextFields):
    """Of reranking."""

    raw_scores: bool | None = None


class ZeroShotParameters(LongTextFields):
    """Of zero-shot classification."""

    multi_label: bool | None = None
    hypothesis_template: HypothesisTemplate = DEFAULT_TEMPLATE


class EntityParameters(LongTextFields):
    """Of token classification."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None


class FillMaskParameters(LongTextFields):
    """Of mask filling."""

    top_k: Count = None


class QuestionParameters(LongTextFields):
    """Of question answering; lengths in tokens."""

    top_k: Count = None
    doc_stride: Annotated[int | None, Field(ge=0, le=_MOST)] = None
    max_answer_len: Count = None
    max_question_len: Count = None
    max_seq_len: Count = None
    handle_impossible_answer: bool | None = None


class GenerationParameters(LongTextFields, GenerateFields):
    """Of the tasks that generate text."""

    return_full_text: bool | None = None
    src_lang: Annotated[str | None, Field(max_length=100)] = None
    tgt_lang: Annotated[str | None, Field(max_length=100)] = None

    def options(self) -> GenerationOptions:
        return GenerationOptions(
            **self.generate_options(),
            echo=bool(self.return_full_text),
            source_language=self.src_lang,
            target_language=self.tgt_lang,
        )

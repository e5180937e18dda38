"""What the `parameters` of a request may say, task by task. Over gRPC each is one bool, number or text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve_app.errors import InvalidInputError
from serve_app.ingress.protocols.fields import (
    Body,
    Dimensions,
    LongTextsChoice,
    Normalize,
    PromptName,
    Stride,
    Truncate,
    TruncationDirection,
    long_texts,
)
from serve_app.ingress.protocols.generation import (
    Beams,
    NewTokens,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from serve_app.options import GenerationOptions, TaskOptions
from serve_app.types import Request, TextInput

_MOST = 100_000
Count = Annotated[int | None, Field(ge=1, le=_MOST)]


class Parameters(Body):
    """Of every task: what becomes of long texts. What no task knows is ignored, as are Triton's own."""

    truncate: Truncate = None
    truncation_direction: TruncationDirection = None
    long_texts: LongTextsChoice = None
    stride: Stride = None

    def request(self, id: str, model: str, task: str, inputs: tuple[TextInput, ...], options: TaskOptions) -> Request:
        side = self.truncation_direction or "right"
        choice = self.long_texts or long_texts(self.truncate)
        return Request(id, model, task, inputs, options, choice, side, self.stride)


class EmbeddingParameters(Parameters):
    """Of embedding."""

    normalize: Normalize = None
    prompt_name: PromptName = None
    dimensions: Dimensions = None


class PromptParameters(Parameters):
    """Of similarity and token embedding."""

    prompt_name: PromptName = None


class ClassificationParameters(Parameters):
    """Of text classification."""

    top_k: Count = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    over_windows: Literal["max", "mean"] = "mean"


class RerankParameters(Parameters):
    """Of reranking."""

    raw_scores: bool | None = None


class ZeroShotParameters(Parameters):
    """Of zero-shot classification."""

    multi_label: bool | None = None
    hypothesis_template: Annotated[str | None, Field(max_length=10_000)] = None

    @property
    def template(self) -> str:
        """Raises InvalidInputError where the label has no place in it."""
        template = "This example is {}." if self.hypothesis_template is None else self.hypothesis_template
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise InvalidInputError("`hypothesis_template` must have one {}, where the label goes")
        return template


class EntityParameters(Parameters):
    """Of token classification."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None


class FillMaskParameters(Parameters):
    """Of mask filling."""

    top_k: Count = None


class QuestionParameters(Parameters):
    """Of question answering; lengths in tokens."""

    top_k: Count = None
    doc_stride: Annotated[int | None, Field(ge=0, le=_MOST)] = None
    max_answer_len: Count = None
    max_question_len: Count = None
    max_seq_len: Count = None
    handle_impossible_answer: bool | None = None


class GenerationParameters(Parameters):
    """Of the tasks that generate text."""

    max_new_tokens: NewTokens = None
    min_new_tokens: Annotated[int | None, Field(ge=0)] = None
    do_sample: bool | None = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    repetition_penalty: RepetitionPenalty = None
    num_beams: Beams = None
    seed: Seed = None
    stop: Stop = ()
    return_full_text: bool | None = None
    src_lang: Annotated[str | None, Field(max_length=100)] = None
    tgt_lang: Annotated[str | None, Field(max_length=100)] = None

    def options(self) -> GenerationOptions:
        """`temperature`, `top_k` and `top_p` ask for sampling where `do_sample` is left out; a temperature of 0 not."""
        greedy = self.temperature == 0
        warped = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        asked = True if self.do_sample is None and warped else self.do_sample
        return GenerationOptions(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            do_sample=False if greedy else asked,
            temperature=None if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            seed=self.seed,
            stop=self.stop,
            echo=bool(self.return_full_text),
            source_language=self.src_lang,
            target_language=self.tgt_lang,
        )

"""Text generation, as Text Generation Inference does it, and tasks that make a text of a text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, Field

from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import documented
from serve_app.ingress.protocols.generation import MOST_LOGPROBS, GenerateFields, GenerationFields, Seq2SeqFields, Stop
from serve_app.ingress.protocols.huggingface.body import TaskBody, Texts
from serve_app.ingress.protocols.huggingface.generated import Told, details_of
from serve_app.ingress.streaming import Events
from serve_app.options import GenerationOptions
from serve_app.outputs import Generated, GeneratedPiece
from serve_app.types import Answer, LongTexts, Request


class GenerationParameters(GenerationFields):
    """As of Text Generation Inference and `InferenceClient.text_generation`."""

    stop_sequences: Stop = ()
    details: bool | None = Field(None, description="Answer with the tokens and why the answer ended.")
    top_n_tokens: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Tokens to tell at each step.")

    @property
    def tells_tokens(self) -> bool:
        return bool(self.details or self.top_n_tokens)

    def options(self, logprobs: int | None = None, **more: Any) -> GenerationOptions:
        options = super().options(logprobs, **more)
        return replace(options, stop=options.stop + self.stop_sequences) if self.stop_sequences else options


class GeneratingBody(TaskBody):
    """Texts to make other texts of, whole or token by token."""

    key: ClassVar[str] = "generated_text"

    stream: bool | None = Field(None, description="Send the answer token by token, as server-sent events.")

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @abstractmethod
    def chosen(self) -> GenerationParameters:
        """The body's parameters, or none."""

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[{generated_text, details?}]`, or with `summary_text` or `translation_text`, one for each input."""
        return encode([self._whole(each, request) for each in cast("Sequence[Generated]", answer.output)])

    def _whole(self, generated: Generated, request: Request) -> dict[str, Any]:
        told = {self.key: generated.text}
        return {**told, "details": details_of(generated, request)} if self.chosen().details else told

    async def write_stream(self, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
        """Text Generation Inference's events, one for each piece; the last one has the whole text."""
        told = Told(cast(GenerationOptions, request.options))
        async for piece in pieces:
            yield encode(told.event(piece))


class TextGenerationBody(GeneratingBody):
    """Texts to go on with."""

    model_config = documented(inputs="Once upon a time", parameters={"max_new_tokens": 20})

    inputs: Texts
    parameters: GenerationParameters | None = None

    def chosen(self) -> GenerationParameters:
        return self.parameters or GenerationParameters()

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.chosen()
        told = self.streams or chosen.tells_tokens
        options = chosen.options((chosen.top_n_tokens or 0) if told else None)
        return chosen.request(request_id, model, "text-generation", self.inputs.values, options)


class TextGenerationOutput(BaseModel):
    """An answer, and with `details` how it came about."""

    generated_text: str
    details: dict[str, Any] | None = None


class Seq2SeqParameters(Seq2SeqFields, GenerationParameters):
    """As of transformers' pipelines; what `generate_parameters` say wins."""

    generate_parameters: GenerateFields | None = None
    truncation: Literal["do_not_truncate", "longest_first", "only_first", "only_second"] | None = Field(
        None, description="do_not_truncate refuses texts that are too long; any other cuts them."
    )

    def choice(self) -> LongTexts | None:
        chosen = super().choice()
        if chosen is not None or self.truncation is None:
            return chosen
        return "error" if self.truncation == "do_not_truncate" else "truncate"

    def options(self, logprobs: int | None = None, **more: Any) -> GenerationOptions:
        nested = self.generate_parameters
        if nested is None:
            return super().options(logprobs, **more)
        said = {name: getattr(nested, name) for name in nested.model_fields_set & GenerateFields.model_fields.keys()}
        return self.model_copy(update={**said, "generate_parameters": None}).options(logprobs, **more)


class Seq2SeqBody(GeneratingBody):
    """Texts to make other texts of."""

    model_config = documented(inputs="The tower is 324 metres tall.", parameters={"max_new_tokens": 20})
    task: ClassVar[str] = "text2text-generation"

    inputs: Texts
    parameters: Seq2SeqParameters | None = None

    def chosen(self) -> Seq2SeqParameters:
        return self.parameters or Seq2SeqParameters()

    def to_request(self, request_id: str, model: str) -> Request:
        """Log probabilities of a stream are not asked for without `details`: a model with beams could not answer."""
        chosen = self.chosen()
        options = chosen.options((chosen.top_n_tokens or 0) if chosen.tells_tokens else None)
        return chosen.request(request_id, model, self.task, self.inputs.values, options)


class SummarizationBody(Seq2SeqBody):
    """Texts to summarize."""

    task = "summarization"
    key = "summary_text"


class TranslationBody(Seq2SeqBody):
    """Texts to translate."""

    task = "translation"
    key = "translation_text"


class Text2TextOutput(BaseModel):
    """A text that was made of a text."""

    generated_text: str
    details: dict[str, Any] | None = None


class SummarizationOutput(BaseModel):
    """A summary."""

    summary_text: str
    details: dict[str, Any] | None = None


class TranslationOutput(BaseModel):
    """A translation."""

    translation_text: str
    details: dict[str, Any] | None = None

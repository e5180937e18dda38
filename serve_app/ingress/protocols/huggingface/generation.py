"""Text generation, as Text Generation Inference does it, and tasks that make a text of a text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, Field

from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import LongTextFields, documented
from serve_app.ingress.protocols.generation import (
    ALL_KNOWN,
    MOST_LOGPROBS,
    UNSUPPORTED,
    GenerateFields,
    Stop,
    refuse_unknown,
    refuse_unsupported,
)
from serve_app.ingress.protocols.huggingface.body import AnyTexts, SomeTexts, TaskBody
from serve_app.ingress.protocols.huggingface.generated import Told, details_of
from serve_app.ingress.streaming import Events
from serve_app.options import GenerationOptions, TaskOptions
from serve_app.outputs import Generated, GeneratedPiece
from serve_app.types import Answer, LongTexts, Request, TextInput

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "decoder_input_details": (False,),
    "frequency_penalty": (0, 0.0),
    "watermark": (False,),
    "adapter_id": (),
    "grammar": (),
}

Truncate = Annotated[
    bool | Annotated[int, Field(ge=1, le=2**31 - 1)] | None,
    Field(
        description="Keep so many tokens of the text, special tokens included, and cut what is before them; true cuts "
        "what the model cannot take, false refuses it."
    ),
]


class GenerationParameters(LongTextFields, GenerateFields):
    """As of Text Generation Inference and `InferenceClient.text_generation`."""

    truncate: Truncate = None  # type: ignore[assignment]  # wider than elsewhere: TGI's is a number
    stop_sequences: Stop = ()
    return_full_text: bool | None = Field(None, description="Put the prompt before the answer.")
    details: bool | None = Field(None, description="Answer with the tokens and why the answer ended.")
    top_n_tokens: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Tokens to tell at each step.")
    best_of: int | None = Field(None, description=UNSUPPORTED)
    decoder_input_details: bool | None = Field(None, description=UNSUPPORTED)
    frequency_penalty: float | None = Field(None, description=UNSUPPORTED)
    watermark: bool | None = Field(None, description=UNSUPPORTED)
    adapter_id: str | None = Field(None, description=UNSUPPORTED)
    grammar: dict[str, Any] | None = Field(None, description=UNSUPPORTED)

    @property
    def prompt_tokens(self) -> int | None:
        """Most tokens of the text, where the client says so."""
        return None if isinstance(self.truncate, bool) else self.truncate

    @property
    def tells_tokens(self) -> bool:
        return bool(self.details or self.top_n_tokens)

    def choice(self) -> LongTexts | None:
        return super().choice() if self.prompt_tokens is None else "truncate"

    def request(self, id: str, model: str, task: str, inputs: tuple[TextInput, ...], options: TaskOptions) -> Request:
        """A number of tokens is counted from the end, as in Text Generation Inference, unless a side is given."""
        if self.prompt_tokens is None or self.truncation_direction is not None:
            return super().request(id, model, task, inputs, options)
        counted = self.model_copy(update={"truncation_direction": "left"})
        return counted.request(id, model, task, inputs, options)

    def options(self, logprobs: int | None, *, infers_sampling: bool = True) -> GenerationOptions:
        """Raises InvalidInputError where something is asked for that is not supported."""
        refuse_unsupported(self, _NEUTRAL)
        chosen = self.generate_options(infers_sampling=infers_sampling)
        chosen["stop"] += self.stop_sequences
        echo = bool(self.return_full_text)
        return GenerationOptions(**chosen, logprobs=logprobs, echo=echo, prompt_tokens=self.prompt_tokens)


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

    inputs: SomeTexts
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


class NestedGenerateFields(GenerateFields):
    """What `generate` is asked; nothing that is not supported is left out silently."""

    model_config = ALL_KNOWN


class Seq2SeqParameters(GenerationParameters):
    """As of transformers' pipelines; what `generate_parameters` say wins. What is not known is refused."""

    model_config = ALL_KNOWN

    generate_parameters: NestedGenerateFields | None = None
    clean_up_tokenization_spaces: bool | None = Field(None, description="Only false is supported.")
    truncation: Literal["do_not_truncate", "longest_first", "only_first", "only_second"] | None = Field(
        None, description="do_not_truncate refuses texts that are too long; any other cuts them."
    )
    src_lang: str | None = Field(None, max_length=100, description="Language of the text, as the model names it.")
    tgt_lang: str | None = Field(None, max_length=100, description="Language of the answer, as the model names it.")

    def choice(self) -> LongTexts | None:
        chosen = super().choice()
        if chosen is not None or self.truncation is None:
            return chosen
        return "error" if self.truncation == "do_not_truncate" else "truncate"

    def options(self, logprobs: int | None, *, infers_sampling: bool = False) -> GenerationOptions:
        refuse_unknown(self, "parameters")
        refuse_unsupported(self, {"clean_up_tokenization_spaces": (False,)})
        nested = self.generate_parameters
        if nested is not None:
            refuse_unknown(nested, "parameters.generate_parameters")
            said = nested.model_fields_set & GenerateFields.model_fields.keys()
            chosen = {name: getattr(nested, name) for name in said}
            return self.model_copy(update={**chosen, "generate_parameters": None}).options(logprobs)
        options = super().options(logprobs, infers_sampling=infers_sampling)
        return replace(options, source_language=self.src_lang, target_language=self.tgt_lang)


class Seq2SeqBody(GeneratingBody):
    """Texts to make other texts of."""

    model_config = documented(inputs="The tower is 324 metres tall.", parameters={"max_new_tokens": 20})
    task: ClassVar[str] = "text2text-generation"

    inputs: AnyTexts
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

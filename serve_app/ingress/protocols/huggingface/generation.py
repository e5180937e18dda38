"""Text generation, as Text Generation Inference does it, and tasks that make a text of a text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, Field

from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import LongTextFields, documented
from serve_app.ingress.protocols.generation import (
    MOST_LOGPROBS,
    UNSUPPORTED,
    GenerateFields,
    Stop,
    refuse_unsupported,
)
from serve_app.ingress.protocols.huggingface.body import AnyTexts, SomeTexts, TaskBody
from serve_app.ingress.streaming import Events
from serve_app.options import GenerationOptions
from serve_app.outputs import Generated, GeneratedPiece, TokenLogprob
from serve_app.types import Answer, LongTexts, Request

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "decoder_input_details": (False,),
    "frequency_penalty": (0, 0.0),
    "typical_p": (1, 1.0),
    "watermark": (False,),
    "adapter_id": (),
    "grammar": (),
}


class GenerationParameters(LongTextFields, GenerateFields):
    """As of Text Generation Inference and `InferenceClient.text_generation`."""

    stop_sequences: Stop = ()
    return_full_text: bool | None = Field(None, description="Put the prompt before the answer.")
    details: bool | None = Field(None, description="Answer with the tokens and why the answer ended.")
    top_n_tokens: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Tokens to tell at each step.")
    best_of: int | None = Field(None, description=UNSUPPORTED)
    decoder_input_details: bool | None = Field(None, description=UNSUPPORTED)
    frequency_penalty: float | None = Field(None, description=UNSUPPORTED)
    typical_p: float | None = Field(None, description=UNSUPPORTED)
    watermark: bool | None = Field(None, description=UNSUPPORTED)
    adapter_id: str | None = Field(None, description=UNSUPPORTED)
    grammar: dict[str, Any] | None = Field(None, description=UNSUPPORTED)

    def options(self, logprobs: int | None) -> GenerationOptions:
        refuse_unsupported(self, _NEUTRAL)
        chosen = self.generate_options()
        chosen["stop"] += self.stop_sequences
        return GenerationOptions(**chosen, logprobs=logprobs, echo=bool(self.return_full_text))


class TextGenerationBody(TaskBody):
    """Texts to go on with."""

    model_config = documented(inputs="Once upon a time", parameters={"max_new_tokens": 20})

    inputs: SomeTexts
    parameters: GenerationParameters | None = None
    stream: bool | None = Field(None, description="Send the answer token by token, as server-sent events.")

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or GenerationParameters()
        told = self.streams or chosen.details or chosen.top_n_tokens
        options = chosen.options((chosen.top_n_tokens or 0) if told else None)
        return chosen.request(request_id, model, "text-generation", self.inputs.values, options)

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[{generated_text, details?}]`, one for each input."""
        details = self.parameters is not None and self.parameters.details
        texts = cast("Sequence[Generated]", answer.output)
        return encode([_whole(each, request, bool(details)) for each in texts])

    async def write_stream(self, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
        """Text Generation Inference's events, one for each piece; the last one has the whole text."""
        told = _Told(cast(GenerationOptions, request.options))
        async for piece in pieces:
            yield encode(told.event(piece))


class _Told:
    """What has been streamed so far."""

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self._text: list[str] = []
        self._last_token = 0
        self._events = self._tokens = self._prompt_tokens = 0

    def event(self, piece: GeneratedPiece) -> dict[str, Any]:
        self._text.append(piece.text)
        self._events += 1
        self._prompt_tokens = max(self._prompt_tokens, piece.prompt_tokens)
        if piece.token is not None:
            self._last_token, self._tokens = piece.token, self._tokens + 1
        logprob = piece.logprob
        token = {
            "id": self._last_token,
            "text": piece.text,
            "logprob": 0.0 if logprob is None else logprob.logprob,
            "special": piece.special,
        }
        event: dict[str, Any] = {"index": self._events, "token": token, "generated_text": None, "details": None}
        if logprob is not None and logprob.top:
            event["top_tokens"] = [_token(top) for top in logprob.top]
        if piece.finish_reason is not None:
            event["generated_text"] = "".join(self._text)
            event["details"] = {
                "finish_reason": _reason(piece.finish_reason, self._options, piece.special),
                "generated_tokens": self._tokens,
                "input_length": self._prompt_tokens,
                "seed": self._options.seed,
            }
        return event


def _whole(generated: Generated, request: Request, with_details: bool) -> dict[str, Any]:
    if not with_details:
        return {"generated_text": generated.text}
    options = cast(GenerationOptions, request.options)
    ended = generated.finish_reason == "stop" and not options.stop
    tokens = [_token(each) for each in generated.logprobs]
    if ended and tokens:
        tokens[-1]["special"] = True
    details: dict[str, Any] = {
        "finish_reason": _reason(generated.finish_reason, options, special=ended),
        "generated_tokens": len(generated.tokens),
        "seed": options.seed,
        "prefill": [],
        "tokens": tokens,
    }
    if options.logprobs:
        details["top_tokens"] = [[_token(top) for top in each.top] for each in generated.logprobs]
    return {"generated_text": generated.text, "details": details}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"id": token.token, "text": token.text, "logprob": token.logprob, "special": False}


def _reason(reason: str, options: GenerationOptions, special: bool) -> str:
    """Text Generation Inference tells an end token from a stop text."""
    if reason == "length":
        return "length"
    return "stop_sequence" if options.stop and not special else "eos_token"


class TextGenerationOutput(BaseModel):
    """An answer, and with `details` how it came about."""

    generated_text: str
    details: dict[str, Any] | None = None


class Seq2SeqParameters(LongTextFields, GenerateFields):
    """As of transformers' pipelines; what `generate_parameters` say wins."""

    generate_parameters: GenerateFields | None = None
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

    def options(self) -> GenerationOptions:
        refuse_unsupported(self, {"clean_up_tokenization_spaces": (False,)})
        nested = self.generate_parameters
        if nested is not None:
            chosen = {name: getattr(nested, name) for name in nested.model_fields_set}
            return self.model_copy(update={**chosen, "generate_parameters": None}).options()
        options = self.generate_options(infers_sampling=False)
        return GenerationOptions(**options, source_language=self.src_lang, target_language=self.tgt_lang)


class Seq2SeqBody(TaskBody):
    """Texts to make other texts of."""

    model_config = documented(inputs="The tower is 324 metres tall.", parameters={"max_new_tokens": 20})
    task: ClassVar[str] = "text2text-generation"
    key: ClassVar[str] = "generated_text"

    inputs: AnyTexts
    parameters: Seq2SeqParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or Seq2SeqParameters()
        return chosen.request(request_id, model, self.task, self.inputs.values, chosen.options())

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[{summary_text}]`, `[{translation_text}]` or `[{generated_text}]`, one for each input."""
        return encode([{self.key: each.text} for each in cast("Sequence[Generated]", answer.output)])


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


class SummarizationOutput(BaseModel):
    """A summary."""

    summary_text: str


class TranslationOutput(BaseModel):
    """A translation."""

    translation_text: str

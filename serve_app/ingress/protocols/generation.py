"""How answers are generated: the fields that the bodies of all protocols have for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import MalformedRequestError
from serve_app.ingress.protocols.fields import WORD_SCHEMA, Body, LongTextFields, kind
from serve_app.options import GenerationOptions, TaskOptions
from serve_app.types import LongTexts, Request, TextInput

MOST_LOGPROBS = 20
_MOST_STOPS = 16
_MOST_IDS = 1024
_MOST_SEQUENCES = 128
_MOST_IDS_IN_A_ROW = 32
_MOST_BIAS = 1e4
_MOST_STOP_CHARACTERS = 1000
_MAX_TOKENS = 2**31 - 1

NewTokens = Annotated[int | None, Field(ge=1, le=_MAX_TOKENS, description="Most tokens of the answer.")]
Temperature = Annotated[
    float | None, Field(ge=0, le=100, allow_inf_nan=False, description="Above 1 more daring, below 1 less; 0: greedy.")
]
TopP = Annotated[
    float | None, Field(gt=0, le=1, allow_inf_nan=False, description="Sample from the tokens that have this share.")
]
TopK = Annotated[
    int | None,
    Field(ge=0, le=_MAX_TOKENS, description="Sample from so many most likely tokens; 0, or -1: from all."),
    BeforeValidator(lambda value: 0 if type(value) is int and value == -1 else value),
]
RepetitionPenalty = Annotated[
    float | None, Field(gt=0, le=100, allow_inf_nan=False, description="Above 1: against what has been said.")
]
Seed = Annotated[
    int | None, Field(ge=0, lt=2**63, description="Makes sampling repeatable: the same seed, the same answer.")
]
DoSample = Annotated[
    bool | None,
    Field(description="Sample; where it is left out, `temperature`, `top_k` and `top_p` ask for it too."),
]
Beams = Annotated[int | None, Field(ge=1, le=64, description="Beams of a beam search.")]


def _share(description: str) -> Any:
    return Field(ge=0, le=1, allow_inf_nan=False, description=description)


def _ngram(description: str) -> Any:
    return Field(ge=0, le=1000, description=description)


def read_stop(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """A text or a list of texts, none of them empty. Raises MalformedRequestError."""
    name = info.field_name or "stop"
    if value is None:
        return ()
    found = [value] if type(value) is str else value
    if type(found) is not list:
        raise MalformedRequestError(f"`{name}` is {kind(value)}; send a text or a list of texts")
    if len(found) > _MOST_STOPS:
        raise MalformedRequestError(f"`{name}` has {len(found)} texts, and {_MOST_STOPS} are allowed")
    for text in found:
        if type(text) is not str or not 0 < len(text) <= _MOST_STOP_CHARACTERS:
            raise MalformedRequestError(f"`{name}` takes texts of 1 to {_MOST_STOP_CHARACTERS} characters")
    return tuple(found)


_STOP_TEXT = {**WORD_SCHEMA, "maxLength": _MOST_STOP_CHARACTERS}

Stop = Annotated[
    tuple[str, ...],
    PlainValidator(read_stop),
    WithJsonSchema(
        {
            "description": "Texts at which the answer ends; none of them is part of it.",
            "anyOf": [
                _STOP_TEXT,
                {"type": "array", "items": _STOP_TEXT, "maxItems": _MOST_STOPS},
                {"type": "null"},
            ],
        }
    ),
]


def _ids(value: Any, where: str, most: int) -> tuple[int, ...]:
    """Token ids; whether the model has them is said where it runs. Raises MalformedRequestError."""
    if type(value) is not list:
        raise MalformedRequestError(f"`{where}` is {kind(value)}; send a list of token ids")
    if len(value) > most:
        raise MalformedRequestError(f"`{where}` has {len(value)} token ids, and {most} are allowed")
    if any(type(each) is not int or not 0 <= each <= _MAX_TOKENS for each in value):
        raise MalformedRequestError(f"`{where}` takes token ids, which are whole numbers from 0")
    return tuple(value)


def read_ids(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    """A list of token ids; none for null. Raises MalformedRequestError."""
    return () if value is None else _ids(value, info.field_name or "", _MOST_IDS)


def read_id_lists(value: Any, info: ValidationInfo) -> tuple[tuple[int, ...], ...]:
    """A list of lists of token ids, none of them empty. Raises MalformedRequestError."""
    return _read_rows(value, info, lambda row, where: _sequence(row, where))


def read_biases(value: Any, info: ValidationInfo) -> tuple[tuple[tuple[int, ...], float], ...]:
    """A list of pairs of token ids and a number. Raises MalformedRequestError."""
    return _read_rows(value, info, _bias)


def _read_rows(value: Any, info: ValidationInfo, read: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    name = info.field_name or ""
    if value is None:
        return ()
    if type(value) is not list:
        raise MalformedRequestError(f"`{name}` is {kind(value)}; send a list of lists")
    if len(value) > _MOST_SEQUENCES:
        raise MalformedRequestError(f"`{name}` has {len(value)} items, and {_MOST_SEQUENCES} are allowed")
    return tuple(read(row, f"{name}[{index}]") for index, row in enumerate(value))


def _sequence(value: Any, where: str) -> tuple[int, ...]:
    found = _ids(value, where, _MOST_IDS_IN_A_ROW)
    if not found:
        raise MalformedRequestError(f"`{where}` is an empty list; send at least one token id")
    return found


def _bias(value: Any, where: str) -> tuple[tuple[int, ...], float]:
    if type(value) is not list or len(value) != 2:
        raise MalformedRequestError(f"`{where}` is no pair; send a list of token ids, and a number")
    return _sequence(value[0], f"{where}[0]"), bias(value[1], f"{where}[1]")


def bias(value: Any, where: str) -> float:
    """What is added to a token's logit. Raises MalformedRequestError."""
    if type(value) not in (int, float) or not -_MOST_BIAS <= value <= _MOST_BIAS:
        raise MalformedRequestError(f"`{where}` takes a number from {-_MOST_BIAS:g} to {_MOST_BIAS:g}")
    return float(value)


_ID = {"type": "integer", "minimum": 0, "maximum": _MAX_TOKENS}
_ROW = {"type": "array", "items": _ID, "minItems": 1, "maxItems": _MOST_IDS_IN_A_ROW}
_PAIR = {
    "type": "array",
    "prefixItems": [_ROW, {"type": "number", "minimum": -_MOST_BIAS, "maximum": _MOST_BIAS}],
    "minItems": 2,
    "maxItems": 2,
}


def _list_schema(items: dict[str, Any], most: int, description: str) -> WithJsonSchema:
    array = {"type": "array", "items": items, "maxItems": most}
    return WithJsonSchema({"description": description, "anyOf": [array, {"type": "null"}]})


def _some_ids(description: str) -> Any:
    schema = _list_schema(_ID, _MOST_IDS, description)
    return Annotated[tuple[int, ...], PlainValidator(read_ids), schema]


class GenerateFields(Body):
    """How an answer is generated, by the names that transformers' `generate` has for it."""

    max_new_tokens: NewTokens = None
    min_new_tokens: Annotated[int | None, Field(ge=0, description="Fewest tokens of the answer.")] = None
    max_length: Annotated[
        int | None,
        Field(ge=1, le=_MAX_TOKENS, description="Most tokens of prompt and answer together; `max_new_tokens` wins."),
    ] = None
    min_length: Annotated[
        int | None, Field(ge=0, le=_MAX_TOKENS, description="Fewest tokens of prompt and answer together.")
    ] = None
    do_sample: DoSample = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    typical_p: Annotated[
        float | None,
        Field(gt=0, le=1, allow_inf_nan=False, description="Sample from so typical tokens that have this share."),
    ] = None
    min_p: Annotated[float | None, _share("Sample from tokens that are so likely, compared with the likeliest.")] = None
    epsilon_cutoff: Annotated[float | None, _share("Sample from tokens that are so likely; 0: from all.")] = None
    eta_cutoff: Annotated[float | None, _share("The same, lower where many tokens are as likely; 0: all.")] = None
    renormalize_logits: Annotated[bool | None, Field(description="Normalize what all these leave of the logits.")] = (
        None
    )
    repetition_penalty: RepetitionPenalty = None
    encoder_repetition_penalty: Annotated[
        float | None,
        Field(gt=0, le=100, allow_inf_nan=False, description="Above 1: for what the encoder has read."),
    ] = None
    no_repeat_ngram_size: Annotated[int | None, _ngram("So many tokens in a row never come twice; 0: they may.")] = None
    encoder_no_repeat_ngram_size: Annotated[
        int | None, _ngram("So many tokens in a row are never taken from what the encoder has read; 0: they may be.")
    ] = None
    num_beams: Beams = None
    length_penalty: Annotated[
        float | None,
        Field(ge=-100, le=100, allow_inf_nan=False, description="Of beams: above 0 for longer answers, below against."),
    ] = None
    early_stopping: Annotated[
        bool | Literal["never"] | None, Field(description="Of beams: end with as many whole answers as beams.")
    ] = None
    seed: Seed = None
    stop: Stop = ()
    stop_strings: Stop = ()
    stop_token_ids: _some_ids("Tokens at which the answer ends, too.") = ()  # type: ignore[valid-type]
    ignore_eos: Annotated[
        bool | None, Field(description="Go on beyond the model's end tokens, to the limit or a stop of this request.")
    ] = None
    suppress_tokens: _some_ids("Tokens that never come.") = ()  # type: ignore[valid-type]
    begin_suppress_tokens: _some_ids("Tokens with which the answer does not begin.") = ()  # type: ignore[valid-type]
    bad_words_ids: Annotated[
        tuple[tuple[int, ...], ...],
        PlainValidator(read_id_lists),
        _list_schema(_ROW, _MOST_SEQUENCES, "Tokens in a row that never come."),
    ] = ()
    sequence_bias: Annotated[
        tuple[tuple[tuple[int, ...], float], ...],
        PlainValidator(read_biases),
        _list_schema(_PAIR, _MOST_SEQUENCES, "Pairs of tokens in a row, and what is added to the last one's logit."),
    ] = ()

    def generate_options(self, *, infers_sampling: bool = True) -> dict[str, Any]:
        """These fields as GenerationOptions takes them.

        `infers_sampling`: whether a field that is about sampling asks for it where `do_sample` is left out.
        """
        chosen = {name: getattr(self, name) for name in GenerateFields.model_fields}
        chosen["stop"] += chosen.pop("stop_strings")
        chosen["ignore_eos"] = bool(self.ignore_eos)
        narrowing = (self.top_k, self.top_p, self.typical_p, self.min_p, self.epsilon_cutoff, self.eta_cutoff)
        found = sampling(self.do_sample, self.temperature, *narrowing)
        do_sample = found.do_sample if infers_sampling or self.temperature == 0 else self.do_sample
        return chosen | {"do_sample": do_sample, "temperature": found.temperature}


class Sampling(NamedTuple):
    """Whether to sample, None as the model's generation config says, and how daringly."""

    do_sample: bool | None
    temperature: float | None


def sampling(do_sample: bool | None, temperature: float | None, *narrowing: float | None) -> Sampling:
    """Where `do_sample` is left out the others, if given, ask for sampling; a temperature of 0 is greedy.

    `narrowing` are the ways to leave less likely tokens out, as `top_k`.
    """
    if temperature == 0:
        return Sampling(False, None)
    warped = any(value is not None for value in (temperature, *narrowing))
    return Sampling(True if do_sample is None and warped else do_sample, temperature)


Truncate = Annotated[
    bool | Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None,
    Field(
        description="Keep so many tokens of the text, special tokens included, and cut what is before them; true cuts "
        "what the model cannot take, false refuses it."
    ),
]


class GenerationFields(LongTextFields, GenerateFields):
    """Of a text that is gone on with."""

    truncate: Truncate = None  # type: ignore[assignment]  # wider than elsewhere: TGI's is a number
    return_full_text: bool | None = Field(None, description="Put the prompt before the answer.")

    @property
    def prompt_tokens(self) -> int | None:
        """Most tokens of the text, where the client says so."""
        return None if isinstance(self.truncate, bool) else self.truncate

    def choice(self) -> LongTexts | None:
        return super().choice() if self.prompt_tokens is None else "truncate"

    def request(self, id: str, model: str, task: str, inputs: tuple[TextInput, ...], options: TaskOptions) -> Request:
        """A number of tokens is counted from the end, as in Text Generation Inference, unless a side is given."""
        if self.prompt_tokens is None or self.truncation_direction is not None:
            return super().request(id, model, task, inputs, options)
        counted = self.model_copy(update={"truncation_direction": "left"})
        return counted.request(id, model, task, inputs, options)

    def options(self, logprobs: int | None = None, **more: Any) -> GenerationOptions:
        """`more` are options that the protocol has other names for."""
        chosen = self.generate_options(infers_sampling=self.infers_sampling)
        echo = bool(self.return_full_text)
        told: dict[str, Any] = {"logprobs": logprobs, "echo": echo, "prompt_tokens": self.prompt_tokens}
        return GenerationOptions(**{**chosen, **told, **more})

    infers_sampling: ClassVar[bool] = True
    """Whether a field that is about sampling asks for it where `do_sample` is left out."""


class Seq2SeqFields(GenerationFields):
    """Of a text that another one is made of."""

    infers_sampling = False

    src_lang: str | None = Field(None, max_length=100, description="Language of the text, as the model names it.")
    tgt_lang: str | None = Field(None, max_length=100, description="Language of the answer, as the model names it.")

    def options(self, logprobs: int | None = None, **more: Any) -> GenerationOptions:
        languages = {"source_language": self.src_lang, "target_language": self.tgt_lang}
        return super().options(logprobs, **languages, **more)

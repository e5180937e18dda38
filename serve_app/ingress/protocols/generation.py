"""How answers are generated: fields that the bodies of several protocols have, and what none of them may ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.ingress.protocols.fields import TEXT_SCHEMA, Body, kind

MOST_LOGPROBS = 20
UNSUPPORTED = "Not supported but for its neutral value."
_MOST_STOPS = 16
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
    int | None, Field(ge=0, le=_MAX_TOKENS, description="Sample from so many most likely tokens; 0: from all.")
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


_STOP_TEXT = {**TEXT_SCHEMA, "maxLength": _MOST_STOP_CHARACTERS}

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

    def generate_options(self, *, infers_sampling: bool = True) -> dict[str, Any]:
        """These fields as GenerationOptions takes them.

        `infers_sampling`: whether a field that is about sampling asks for it where `do_sample` is left out.
        """
        chosen = {name: getattr(self, name) for name in GenerateFields.model_fields}
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


def refuse_unsupported(body: Body, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InvalidInputError where a field asks for what this server does not do, other than its neutral values."""
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise InvalidInputError(f"`{name}`: this server does not support it; leave it out")


_KNOWN = frozenset(
    (
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "constraints",
        "decoder_start_token_id",
        "diversity_penalty",
        "dola_layers",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "max_time",
        "num_beam_groups",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "penalty_alpha",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "return_dict_in_generate",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "token_healing",
        "top_h",
        "use_cache",
        "watermarking_config",
    )
)
"""Names that `generate` knows and that are not supported here; no other name that a client sent is repeated."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "use_cache": (True,),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "output_scores"), (False,)),
    "return_dict_in_generate": (False,),
}
"""Values that change nothing."""

ALL_KNOWN = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})
"""Of fields that are refused by `refuse_unknown` where they are not known."""


def refuse_unknown(body: Body, where: str) -> None:
    """Nothing that is asked is dropped without a word. `body` allows extra fields; `where` is its name in the request.

    Raises InvalidInputError, with what is supported.
    """
    for name, value in (body.model_extra or {}).items():
        if value is None or value in _NEUTRAL.get(name, ()):
            continue
        what = f"`{name}` is not supported" if name in _KNOWN else "has a field that is not known"
        raise InvalidInputError(f"`{where}`: {what} here; supported are: {', '.join(type(body).model_fields)}")

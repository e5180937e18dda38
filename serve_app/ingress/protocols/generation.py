"""How answers are generated: fields that the bodies of several protocols have, and what none of them may ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field, PlainValidator, ValidationInfo, WithJsonSchema

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
TopK = Annotated[int | None, Field(ge=1, le=_MAX_TOKENS, description="Sample from so many most likely tokens.")]
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
    do_sample: DoSample = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    repetition_penalty: RepetitionPenalty = None
    num_beams: Beams = None
    seed: Seed = None
    stop: Stop = ()

    def generate_options(self, *, infers_sampling: bool = True) -> dict[str, Any]:
        """These fields as GenerationOptions takes them.

        `infers_sampling`: whether a temperature, top_k or top_p asks for sampling where `do_sample` is left out.
        """
        chosen = {name: getattr(self, name) for name in GenerateFields.model_fields}
        found = sampling(self.do_sample, self.temperature, self.top_k, self.top_p)
        do_sample = found.do_sample if infers_sampling or self.temperature == 0 else self.do_sample
        return chosen | {"do_sample": do_sample, "temperature": found.temperature}


class Sampling(NamedTuple):
    """Whether to sample, None as the model's generation config says, and how daringly."""

    do_sample: bool | None
    temperature: float | None


def sampling(do_sample: bool | None, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
    """Where `do_sample` is left out the other three ask for sampling; a temperature of 0 is greedy."""
    if temperature == 0:
        return Sampling(False, None)
    warped = any(value is not None for value in (temperature, top_k, top_p))
    return Sampling(True if do_sample is None and warped else do_sample, temperature)


def refuse_unsupported(body: Body, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InvalidInputError where a field asks for what this server does not do, other than its neutral values."""
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise InvalidInputError(f"`{name}`: this server does not support it; leave it out")

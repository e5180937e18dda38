"""What tasks check of a request before its texts are tokenized."""

from __future__ import annotations

from typing import TypeVar, cast

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.options import TaskOptions
from serve_app.types import LongTexts, ModelCard, Request, Side, TextPair, TokenizeRequest

OptionsT = TypeVar("OptionsT", bound=TaskOptions)


def options_of(request: Request, kind: type[OptionsT]) -> OptionsT:
    """The request's options. Raises MalformedRequestError if they are another task's."""
    if not isinstance(request.options, kind):
        raise MalformedRequestError(f"task {request.task} takes {kind.__name__}, not {type(request.options).__name__}")
    return request.options


def texts_of(request: Request) -> tuple[str, ...]:
    """The inputs, which must be single texts. Raises InvalidInputError."""
    for index, value in enumerate(request.inputs):
        if not isinstance(value, str):
            raise InvalidInputError(f"inputs[{index}]: task {request.task} takes a single text")
    return cast("tuple[str, ...]", request.inputs)


def pairs_of(request: Request) -> tuple[TextPair, ...]:
    """The inputs, which must be pairs of texts. Raises InvalidInputError."""
    for index, value in enumerate(request.inputs):
        if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)):
            raise InvalidInputError(f"inputs[{index}]: task {request.task} takes a pair of texts")
    return cast("tuple[TextPair, ...]", request.inputs)


def long_texts_of(request: Request, card: ModelCard) -> LongTexts:
    return request.long_texts or card.long_texts


def truncation_side_of(request: Request, card: ModelCard, otherwise: Side = "right") -> Side:
    """The request's, else the configuration's or the tokenizer's, which the card has, else `otherwise`."""
    return request.truncation_side or card.truncation_side or otherwise


def stride_of(request: Request, card: ModelCard) -> int:
    return card.stride if request.stride is None else request.stride


def tokenize_request(request: Request, card: ModelCard, prompt: str = "") -> TokenizeRequest:
    """The request's inputs as they are, with what is to become of long ones."""
    return TokenizeRequest(
        inputs=request.inputs,
        long_texts=long_texts_of(request, card),
        truncation_side=truncation_side_of(request, card),
        prompt=prompt,
        stride=stride_of(request, card),
    )


def prompt_of(prompt_name: str | None, card: ModelCard) -> str:
    """The text of a prompt, of the model's default one where none is named. Raises InvalidInputError."""
    name = prompt_name if prompt_name is not None else card.default_prompt_name
    if name is None:
        return ""
    if name not in card.prompts:
        known = ", ".join(sorted(card.prompts)) or "none"
        raise InvalidInputError(f"prompt_name: model {card.name} has no such prompt; it has: {known}")
    return card.prompts[name]

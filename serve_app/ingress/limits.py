"""Limits on one request that need no tokenizer."""

from __future__ import annotations

from typing import cast

from serve_app.config import IngressSettings
from serve_app.errors import BatchTooLargeError, InputTooLongError, InvalidInputError
from serve_app.options import GenerationOptions, RerankOptions, ZeroShotOptions
from serve_app.types import Chat, Request, TextInput

_MOST_REPEATED = 4
"""So many times `max_text_characters` may all texts of a request have together where each query goes with each
document, or each text with each label: a small body would else ask for gigabytes."""


def check_limits(request: Request, settings: IngressSettings) -> int:
    """Characters of all inputs, a token id counting as one.

    Raises BatchTooLargeError or InputTooLongError where a limit is passed.
    """
    lengths = [characters_of(value) for value in request.inputs]
    _check_count(len(lengths), settings, "inputs")
    if isinstance(request.options, GenerationOptions) and request.options.n > 1:
        _check_count(len(lengths) * request.options.n, settings, "answers")
    if not settings.accept_token_ids:
        _refuse_ids(request)
    longest = max(lengths)
    if longest > settings.max_text_characters:
        raise InputTooLongError(
            f"inputs[{lengths.index(longest)}]: has {longest} characters, and {settings.max_text_characters} are "
            "allowed; shorten or split it"
        )
    total = sum(lengths)
    _check_pairs(request, lengths, settings)
    return total


def check_stream(request: Request, settings: IngressSettings) -> int:
    """As `check_limits`, and there must be one input. Raises InvalidInputError too."""
    if len(request.inputs) != 1:
        raise InvalidInputError("only the answer to one input can be streamed; send several requests")
    return check_limits(request, settings)


def _refuse_ids(request: Request) -> None:
    for index, value in enumerate(request.inputs):
        if isinstance(value, tuple) and value and not isinstance(value[0], str):
            raise InvalidInputError(
                f"inputs[{index}]: token ids are not taken here, because those of another tokenizer would be answered "
                "as another text; send texts (LangChain: check_embedding_ctx_length=False)"
            )


def characters_of(value: TextInput) -> int:
    """Characters of a text, of both texts of a pair or of a conversation; a token id counts as one."""
    if isinstance(value, str | Chat):
        return len(value)
    first = value[0]
    return len(value) if isinstance(first, int) else len(first) + len(cast(str, value[1]))


def _check_count(count: int, settings: IngressSettings, what: str) -> None:
    if count > settings.max_client_batch_size:
        raise BatchTooLargeError(
            f"{count} {what} in one request, and {settings.max_client_batch_size} are allowed; send several requests"
        )


def _check_pairs(request: Request, lengths: list[int], settings: IngressSettings) -> None:
    options = request.options
    if isinstance(options, ZeroShotOptions):
        labels = len(options.labels)
        _check_count(labels * len(lengths), settings, "pairs of text and label")
        written = sum(map(len, options.labels)) + labels * len(options.template)
        repeated = sum(lengths) * labels + written * len(lengths)
    elif isinstance(options, RerankOptions):
        repeated = sum(lengths[1:]) + lengths[0] * (len(lengths) - 1)
    else:
        return
    allowed = _MOST_REPEATED * settings.max_text_characters
    if repeated > allowed:
        raise BatchTooLargeError(
            f"the pairs of this request have {repeated} characters together, and {allowed} are allowed; "
            "send several requests"
        )

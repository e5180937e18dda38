"""Text Embeddings Inference's `/tokenize` and `/decode`: texts to tokens and back, without the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.config import IngressSettings
from serve_app.errors import BatchTooLargeError, EmptyInputError, InputTooLongError, MalformedRequestError
from serve_app.ingress.backlog import CHARACTERS
from serve_app.ingress.body import parse_body, read_body
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Exchange, Reply, while_connected
from serve_app.ingress.inference import choose_model
from serve_app.ingress.protocols.fields import (
    IDS_SCHEMA,
    TEXT_SCHEMA,
    TEXTS_SCHEMA,
    Body,
    PromptName,
    check_count,
    documented,
    items_schema,
    text,
    texts,
)
from serve_app.ingress.protocols.fields import token_ids as read_ids
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.types import TokenIds


def read_one_or_several(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """A text or a list of texts. Raises EmptyInputError or MalformedRequestError."""
    name = info.field_name or "inputs"
    return texts(value, name, info) if type(value) is list else (text(value, name),)


def read_sequences(value: Any, info: ValidationInfo) -> tuple[TokenIds, ...]:
    """Token ids, or a list of lists of them. Raises EmptyInputError or MalformedRequestError."""
    name = info.field_name or "ids"
    if type(value) is not list:
        raise MalformedRequestError(f"`{name}` must be a list of token ids, or a list of such lists")
    if not value:
        raise EmptyInputError(f"`{name}` is empty; send at least one token id")
    if type(value[0]) is not list:
        return (read_ids(value, name),)
    check_count(value, info)
    if any(type(item) is not list for item in value):
        raise MalformedRequestError(f"`{name}` has lists and other things; send lists of token ids only")
    return tuple(read_ids(item, f"{name}[{index}]") for index, item in enumerate(value))


class TokenizeBody(Body):
    """Texts to tokenize."""

    model_config = documented(inputs="What is Deep Learning?")

    model: str | None = None
    inputs: Annotated[
        tuple[str, ...],
        PlainValidator(read_one_or_several),
        WithJsonSchema({"description": "A text, or a list of texts.", "anyOf": [TEXT_SCHEMA, TEXTS_SCHEMA]}),
    ]
    add_special_tokens: bool = Field(True, description="With the tokens that the model wants around a text.")
    prompt_name: PromptName = None


class DecodeBody(Body):
    """Token ids to make text of."""

    model_config = documented(ids=[101, 2023, 2003, 102])

    model: str | None = None
    ids: Annotated[
        tuple[TokenIds, ...],
        PlainValidator(read_sequences),
        WithJsonSchema(
            {
                "description": "Token ids, or a list of lists of them.",
                "anyOf": [IDS_SCHEMA, items_schema(IDS_SCHEMA)],
            }
        ),
    ]
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")


class Token(BaseModel):
    """A token; `start` and `stop` in bytes of the text in UTF-8, the prompt before it included; null if special."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


async def tokenize(exchange: Exchange) -> Reply:
    """`[[{id, text, special, start, stop}]]`, for each text its tokens."""
    body = parse_body(TokenizeBody, await read_body(exchange), exchange.settings)
    model = choose_model(exchange, body.model)
    lengths = [len(each) for each in body.inputs]
    exchange.task = "tokenize"
    _check(lengths, exchange.settings)
    exchange.reserve(-(-sum(lengths) // CHARACTERS))
    special_tokens, usage = body.add_special_tokens, exchange.usage
    work = exchange.service.tokenize(model, body.inputs, special_tokens, body.prompt_name, usage)
    found = await while_connected(exchange.receive, work, exchange.time_left_s)
    return Reply(await asyncio.to_thread(encode, found))


async def decode(exchange: Exchange) -> Reply:
    """`[text]`, one for each list of token ids."""
    body = parse_body(DecodeBody, await read_body(exchange), exchange.settings)
    model = choose_model(exchange, body.model)
    lengths = [len(each) for each in body.ids]
    exchange.task = "decode"
    _check(lengths, exchange.settings)
    exchange.reserve(sum(lengths))
    work = exchange.service.decode(model, body.ids, body.skip_special_tokens, exchange.usage)
    found = await while_connected(exchange.receive, work, exchange.time_left_s)
    return Reply(encode(found))


def _check(lengths: Sequence[int], settings: IngressSettings) -> None:
    if len(lengths) > settings.max_client_batch_size:
        raise BatchTooLargeError(
            f"{len(lengths)} inputs in one request, and {settings.max_client_batch_size} are allowed; "
            "send several requests"
        )
    if max(lengths) > settings.max_text_characters:
        raise InputTooLongError(
            f"an input has a length of {max(lengths)}, and {settings.max_text_characters} are allowed; split it"
        )


def routes(dialect: Dialect) -> tuple[Route, ...]:
    endpoints: tuple[tuple[str, Callable[[Exchange], Awaitable[Reply]], str, Any, type[BaseModel]], ...] = (
        ("/tokenize", tokenize, "Tokenize texts", list[list[Token]], TokenizeBody),
        ("/decode", decode, "Make text of token ids", list[str], DecodeBody),
    )
    return tuple(
        Route("POST", place + path, endpoint, dialect, summary, answer, body, failures=COMPUTE_FAILURES, costs=False)
        for place in ANY_MODEL
        for path, endpoint, summary, answer, body in endpoints
    )

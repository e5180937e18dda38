"""The request body: read within its limits, then validated in one step from bytes to a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve_app.config import IngressSettings
from serve_app.errors import BodyTimeoutError, BodyTooLargeError, MalformedRequestError, UnsupportedMediaError
from serve_app.ingress.depth import check_nesting
from serve_app.ingress.exchange import ClientDisconnectedError, Exchange
from serve_app.ingress.protocols.fields import check_known
from serve_app.ingress.visit import too_late
from serve_app.timeouts import within

BodyT = TypeVar("BodyT", bound=BaseModel)

_LARGE_BYTES = 1_000_000
"""Of a larger body the look at its nesting and its parsing are two turns of the event loop."""

_JSON_HINTS = (
    ("hex escape", r"a \u escape is half of a surrogate pair or cut short; send whole characters"),
    ("unicode code point", "it is not valid UTF-8"),
    ("recursion limit", "it is nested too deeply"),
    ("line 1 column 0", "it is empty"),
)
"""What the parser's words mean for a client, where they do not say it themselves."""


async def read_body(exchange: Exchange, media: bytes | None = None) -> bytes:
    """The whole body; `media` is a content type that it may have beside JSON's, and then it is not looked into.

    Raises UnsupportedMediaError, BodyTooLargeError (before reading where Content-Length tells, else as soon as the
    limit is passed), OverloadedError (too many bytes of bodies are under way), BodyTimeoutError, DeadlineExceededError,
    MalformedRequestError (nested too deeply, or too many parts) or ClientDisconnectedError.
    """
    _check_media(exchange, media)
    settings = exchange.settings
    exchange.hold(_declared_length(exchange.headers.get(b"content-length"), settings.max_body_bytes))
    try:
        timeout_s = min(settings.body_timeout_s, exchange.time_left_s)
        raw = await within(_collect(exchange, settings.max_body_bytes), timeout_s)
    except asyncio.TimeoutError:
        if not exchange.time_left_s:
            raise too_late() from None
        raise BodyTimeoutError(
            f"the body did not arrive within {settings.body_timeout_s:g} s; send it faster or in smaller requests"
        ) from None
    if media is None:
        check_nesting(raw, settings)
        if len(raw) > _LARGE_BYTES:
            await asyncio.sleep(0)
    return raw


async def _collect(exchange: Exchange, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        exchange.hold(size)
        chunks.append(chunk)
        if not message.get("more_body", False):
            exchange.body_read = True
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _check_media(exchange: Exchange, allowed: bytes | None) -> None:
    media = exchange.headers.get(b"content-type")
    if not media and b"origin" in exchange.headers:
        # A browser says where a page is from, and asks us first only if the page names a type of its own.
        raise UnsupportedMediaError("a web page has to send the header content-type: application/json")
    if media not in (None, b"application/json", allowed) and not _is_json(media):
        raise UnsupportedMediaError("send JSON, with the header content-type: application/json")
    if exchange.headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMediaError("send the body uncompressed, without the header content-encoding")


def _is_json(media: bytes) -> bool:
    kind = media.partition(b";")[0].strip().lower()
    return kind in (b"", b"application/json", b"text/json") or (
        kind.startswith(b"application/") and kind.endswith(b"+json")
    )


def _declared_length(declared: bytes | None, limit: int) -> int:
    """0 where it is not told. Raises BodyTooLargeError."""
    length = int(declared[:20]) if declared is not None and declared.isdigit() else 0
    if length > limit:
        raise _too_large(limit)
    return length


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than the {limit} bytes that one request may have; split it")


def parse_body(model: type[BodyT], raw: bytes, settings: IngressSettings) -> BodyT:
    """`raw` as a validated `model`.

    Raises MalformedRequestError that names the first wrong field, never its value, InvalidInputError for a field that
    the model does not have (`check_known`), or what the fields' own readers raise: BatchTooLargeError beyond the
    `max_client_batch_size` of `settings`, before anything is made of the items.
    """
    try:
        body = model.model_validate_json(raw, context={"max_client_batch_size": settings.max_client_batch_size})
    except ValidationError as error:
        raise MalformedRequestError(_explain(_first(error))) from None
    check_known(body)
    return body


def validated(model: type[BodyT], value: dict[str, Any], where: str) -> BodyT:
    """As `parse_body`, of a part that has been read already; `where` is its name in the request."""
    try:
        body = model.model_validate(value)
    except ValidationError as error:
        problem = _first(error)
        raise MalformedRequestError(_explain({**problem, "loc": (where, *problem["loc"])})) from None
    check_known(body, where)
    return body


def _first(error: ValidationError) -> ErrorDetails:
    return error.errors(include_url=False, include_input=False)[0]


def _explain(problem: ErrorDetails) -> str:
    kind, message = problem["type"], problem["msg"]
    if kind == "json_invalid":
        return _explain_json(message.removeprefix("Invalid JSON: "))
    where = _place(problem["loc"])
    if not where:
        return "the body must be a JSON object"
    if kind == "missing":
        return f"`{where}` is missing"
    if kind == "too_long":
        return f"`{where}` has more than the {problem['ctx']['max_length']} items that are allowed"
    return f"`{where}`: {message[:1].lower()}{message[1:]}"


def _place(parts: Iterable[str | int]) -> str:
    """As in `messages[0].content`."""
    told = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return told.removeprefix(".")


def _explain_json(message: str) -> str:
    for words, meaning in _JSON_HINTS:
        if words in message:
            return f"the body is not valid JSON: {meaning} ({message})"
    return f"the body is not valid JSON: {message}"

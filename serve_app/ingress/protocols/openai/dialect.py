"""OpenAI's envelope for errors."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from serve_app.errors import InputTooLongError, ModelNotFoundError, RequestError, ServeAppError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.statuses import ErrorKind


class OpenAIError(BaseModel):
    """What is wrong and what to change."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    """OpenAI's envelope; the request id is in the header x-request-id."""

    error: OpenAIError


_FIELD = re.compile(r"`([a-z][\w.\[\]]*)`|([a-z]\w*(?:\[\d+\])?): ")
"""Every message about a field begins with its name: in backquotes, or with a colon."""

_INPUTS = re.compile(r"inputs\b")


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str, inputs: str = "input") -> Mapping[str, Any]:
    """`inputs` is the field that a route has its inputs in."""
    code = "context_length_exceeded" if isinstance(error, InputTooLongError) else error.code
    param = _param(error, inputs)
    return {"error": {"message": error.message, "type": kind.openai_type, "param": param, "code": code}}


def _param(error: ServeAppError, inputs: str) -> str | None:
    """The field that a client's error is about, as far as its message tells one."""
    if isinstance(error, ModelNotFoundError):
        return "model"
    found = _FIELD.match(error.message) if isinstance(error, RequestError) else None
    if found is None or found[2] == "options":
        return None
    return _INPUTS.sub(inputs, found[1] or found[2], count=1)


def dialect_of(inputs: str) -> Dialect:
    """OpenAI answers 400 to all that a client can put right in the body."""
    write = functools.partial(write_error, inputs=inputs)
    return Dialect("OpenAI", write, OpenAIErrorBody, unprocessable=400)


DIALECT = dialect_of("input")

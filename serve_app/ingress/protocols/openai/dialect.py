"""OpenAI's envelope for errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from serve_app.errors import ServeAppError
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


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    return {"error": {"message": error.message, "type": kind.openai_type, "param": None, "code": error.code}}


DIALECT = Dialect("OpenAI", write_error, OpenAIErrorBody)

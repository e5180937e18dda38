"""The errors of Hugging Face's own servers (TEI, TGI, inference endpoints), which several protocols here share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from serve_app.errors import ServeAppError
from serve_app.ingress.statuses import ErrorKind


class ErrorBody(BaseModel):
    """What is wrong and what to change."""

    error: str = Field(description="What is wrong and what to change, for people.")
    error_type: str = Field(
        description="validation, empty, overloaded, unhealthy or backend; where text is generated, Text Generation "
        "Inference's: validation, overloaded, generation or incomplete_generation."
    )
    code: str = Field(description="Stable, for programs.")
    request_id: str = Field(description="Also in the header x-request-id, and in the server's log.")


class TEIErrorBody(BaseModel):
    """What is wrong and what to change, as Text Embeddings Inference tells it."""

    error: str = Field(description="What is wrong and what to change, for people.")
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]
    code: str = Field(description="Stable, for programs.")
    request_id: str = Field(description="Also in the header x-request-id, and in the server's log.")


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    return typed_error(error, kind.tei_type, request_id)


def write_tei_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    """TEI writes the names of its `ErrorType` as they stand (router/src/lib.rs)."""
    return typed_error(error, kind.tei_type.capitalize(), request_id)


def typed_error(error: ServeAppError, error_type: str, request_id: str) -> Mapping[str, Any]:
    return {"error": error.message, "error_type": error_type, "code": error.code, "request_id": request_id}

"""The errors of Hugging Face's own servers (TEI, TGI, inference endpoints), which several protocols here share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from serve_app.errors import ServeAppError
from serve_app.ingress.statuses import ErrorKind


class ErrorBody(BaseModel):
    """What is wrong and what to change."""

    error: str = Field(description="What is wrong and what to change, for people.")
    error_type: str = Field(description="TEI's type: validation, empty, overloaded, unhealthy or backend.")
    code: str = Field(description="Stable, for programs.")
    request_id: str = Field(description="Also in the header x-request-id, and in the server's log.")


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    return {"error": error.message, "error_type": kind.tei_type, "code": error.code, "request_id": request_id}

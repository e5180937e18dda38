"""How a protocol writes its errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from serve_app.errors import ServeAppError
from serve_app.ingress.statuses import ErrorKind


@dataclass(frozen=True, slots=True)
class Dialect:
    """What all routes of one protocol share: its name, and how it writes an error."""

    name: str
    write_error: Callable[[ServeAppError, ErrorKind, str], Mapping[str, Any]]
    """The JSON object for an error, its kind and the request id."""
    error_model: type[BaseModel]
    """The same, as a schema for the documentation."""
    write_broken_off: Callable[[ServeAppError, ErrorKind, str], Mapping[str, Any]] | None = None
    """As `write_error`, where a part of a streamed answer has been sent; None: no different."""
    unprocessable: int = 422
    """The status of a body that is well formed, and that the model cannot take."""

    def status(self, kind: ErrorKind) -> int:
        return self.unprocessable if kind.status == 422 else kind.status

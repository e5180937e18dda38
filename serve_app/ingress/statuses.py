"""Which HTTP status and which protocol's own type each error has: one table for every route.

TEI's types are those of its `ErrorType`; OpenAI's those of https://platform.openai.com/docs/guides/error-codes.
Statuses: 429 slow down; 503 not ready, draining or a replica was lost; 504 our deadline passed; 500 a bug of ours;
424, as in TEI, the model failed on this input, so that sending it again is no use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app import errors


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of error looks on the wire."""

    status: int
    tei_type: str
    openai_type: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

STATUSES: Mapping[type[errors.ServeAppError], ErrorKind] = {
    errors.ServeAppError: ErrorKind(500, "backend", _SERVER),
    errors.ConfigError: ErrorKind(500, "backend", _SERVER),
    errors.CacheError: ErrorKind(503, "unhealthy", _SERVER),
    errors.SourceNotFoundError: ErrorKind(503, "unhealthy", _SERVER),
    errors.SourceAccessError: ErrorKind(503, "unhealthy", _SERVER),
    errors.SourceUnavailableError: ErrorKind(503, "unhealthy", _SERVER),
    errors.IncompleteModelError: ErrorKind(503, "unhealthy", _SERVER),
    errors.DiskFullError: ErrorKind(503, "unhealthy", _SERVER),
    errors.RequestError: ErrorKind(400, "validation", _INVALID),
    errors.MalformedRequestError: ErrorKind(400, "validation", _INVALID),
    errors.InvalidInputError: ErrorKind(422, "validation", _INVALID),
    errors.EmptyInputError: ErrorKind(400, "empty", _INVALID),
    errors.InputTooLongError: ErrorKind(422, "validation", _INVALID),
    errors.BatchTooLargeError: ErrorKind(422, "validation", _INVALID),
    errors.BodyTooLargeError: ErrorKind(413, "validation", _INVALID),
    errors.BodyTimeoutError: ErrorKind(408, "validation", _INVALID),
    errors.ModelNotFoundError: ErrorKind(404, "validation", _INVALID),
    errors.RouteNotFoundError: ErrorKind(404, "validation", _INVALID),
    errors.MethodNotAllowedError: ErrorKind(405, "validation", _INVALID),
    errors.UnsupportedMediaError: ErrorKind(415, "validation", _INVALID),
    errors.UnauthorizedError: ErrorKind(401, "validation", _INVALID),
    errors.ForbiddenError: ErrorKind(403, "validation", _INVALID),
    errors.ServerError: ErrorKind(500, "backend", _SERVER),
    errors.OverloadedError: ErrorKind(429, "overloaded", "rate_limit_error"),
    errors.QuotaExceededError: ErrorKind(429, "overloaded", "rate_limit_error"),
    errors.UnavailableError: ErrorKind(503, "unhealthy", _SERVER),
    errors.VersionGoneError: ErrorKind(503, "unhealthy", _SERVER),
    errors.DeadlineExceededError: ErrorKind(504, "backend", _SERVER),
    errors.ModelFailureError: ErrorKind(424, "backend", _SERVER),
}


def kind_of(error: errors.ServeAppError) -> ErrorKind:
    """The entry of the nearest class in the table, so that a subclass made elsewhere is never without a status."""
    for cls in type(error).__mro__:
        kind = STATUSES.get(cls)
        if kind is not None:
            return kind
    raise AssertionError("ServeAppError is in the table")


_COME_BACK = frozenset({429, 503})
"""Statuses that tell the client when to come back."""


def retry_after_s(error: errors.ServeAppError) -> int | None:
    """Whole seconds after which it is worth while to try again, at least 1; None where waiting is no use."""
    return max(1, math.ceil(error.retry_after_s or 1)) if kind_of(error).status in _COME_BACK else None

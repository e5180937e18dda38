"""Every error that this application raises on purpose.

ServeAppError
├── ConfigError                 configuration is wrong; nothing was started
├── CacheError                  a model's files could not be made ready on this node
│   ├── SourceNotFoundError     no such repository, revision, package or directory
│   ├── SourceAccessError       the source refused us (401, 403)
│   ├── SourceUnavailableError  the source did not answer in time (429, 5xx, network)
│   ├── IncompleteModelError    a needed file is missing, truncated or altered
│   └── DiskFullError           not enough free space for the model on this node
├── RequestError                the client can put it right
│   ├── MalformedRequestError   not JSON, wrong types, unknown or missing fields
│   ├── InvalidInputError       well formed, but this model cannot take it
│   ├── EmptyInputError         nothing to compute
│   ├── InputTooLongError       more tokens than the model or its memory takes
│   ├── BatchTooLargeError      more inputs in one request than allowed
│   ├── BodyTooLargeError       more bytes than allowed
│   ├── BodyTimeoutError        the body did not arrive in time
│   ├── ModelNotFoundError      no model of that name is served
│   ├── RouteNotFoundError      no such path
│   ├── MethodNotAllowedError   the path exists, but not with this method
│   ├── UnsupportedMediaError   a body that is not JSON, or is compressed
│   ├── UnauthorizedError       no API key, or one that is not known here
│   └── ForbiddenError          an API key that may not ask this
└── ServerError                 not the client's fault
    ├── OverloadedError         a bounded queue is full: come back later
    │   └── QuotaExceededError  an API key has used up what it may
    ├── UnavailableError        not ready, draining, or a replica was lost
    │   └── VersionGoneError    no replica of the version that the request began with is left
    ├── DeadlineExceededError   the request's time ran out before the answer
    └── ModelFailureError       the forward pass failed for this input

Errors cross process borders (ingress, tokenizer, model), so each pickles to itself: class, message and fields.
`code` is stable and part of the HTTP interface; the status of each is in `serve_app.ingress.statuses`.
"""

from __future__ import annotations

from typing import ClassVar

LEAST_WAIT_S, MOST_WAIT_S = 1.0, 60.0


def bounded_wait_s(seconds: float) -> float:
    """An estimate as a `retry_after_s`: never so soon that it is no use, nor so late that nobody comes back."""
    return min(MOST_WAIT_S, max(LEAST_WAIT_S, seconds))


class ServeAppError(Exception):
    """Base of every error raised on purpose; `message` says what is wrong and what to change."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.retry_after_s)


def _rebuild(cls: type[ServeAppError], message: str, retry_after_s: float | None) -> ServeAppError:
    return cls(message, retry_after_s=retry_after_s)


class ConfigError(ServeAppError):
    code = "bad_configuration"


class CacheError(ServeAppError):
    code = "cache_failed"


class SourceNotFoundError(CacheError):
    code = "source_not_found"


class SourceAccessError(CacheError):
    code = "source_access_denied"


class SourceUnavailableError(CacheError):
    code = "source_unavailable"


class IncompleteModelError(CacheError):
    code = "model_incomplete"


class DiskFullError(CacheError):
    code = "disk_full"


class RequestError(ServeAppError):
    code = "bad_request"


class MalformedRequestError(RequestError):
    code = "malformed_request"


class InvalidInputError(RequestError):
    code = "invalid_input"


class EmptyInputError(RequestError):
    code = "empty_input"


class InputTooLongError(RequestError):
    code = "input_too_long"


class BatchTooLargeError(RequestError):
    code = "batch_too_large"


class BodyTooLargeError(RequestError):
    code = "body_too_large"


class BodyTimeoutError(RequestError):
    code = "body_timeout"


class ModelNotFoundError(RequestError):
    code = "model_not_found"


class RouteNotFoundError(RequestError):
    code = "route_not_found"


class MethodNotAllowedError(RequestError):
    code = "method_not_allowed"


class UnsupportedMediaError(RequestError):
    code = "unsupported_media_type"


class UnauthorizedError(RequestError):
    code = "unauthorized"


class ForbiddenError(RequestError):
    code = "forbidden"


class ServerError(ServeAppError):
    code = "internal"


class OverloadedError(ServerError):
    code = "overloaded"


class QuotaExceededError(OverloadedError):
    code = "quota_exceeded"


class UnavailableError(ServerError):
    code = "unavailable"


class VersionGoneError(UnavailableError):
    code = "unavailable"


class DeadlineExceededError(ServerError):
    code = "deadline_exceeded"


class ModelFailureError(ServerError):
    code = "model_failure"

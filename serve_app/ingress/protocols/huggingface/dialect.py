"""How these routes write errors: as the client parses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.errors import ModelFailureError, OverloadedError, RequestError, ServeAppError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.protocols.envelope import ErrorBody, typed_error, write_error
from serve_app.ingress.statuses import ErrorKind


def _write_generation_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    """In Text Generation Inference's types, of which the client makes its exceptions.

    There all that goes wrong behind the router is `generation` (router/src/infer/mod.rs): here so are a lost replica,
    a bug and a deadline, which it does not have.
    """
    return typed_error(error, _generation_type(error, "generation"), request_id)


def _write_broken_off(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    """The same where a part of the answer has been sent: what is not the model's own failure leaves it incomplete."""
    usual = "generation" if isinstance(error, ModelFailureError) else "incomplete_generation"
    return typed_error(error, _generation_type(error, usual), request_id)


def _generation_type(error: ServeAppError, usual: str) -> str:
    if isinstance(error, OverloadedError):
        return "overloaded"
    return "validation" if isinstance(error, RequestError) else usual


DIALECT = Dialect("Hugging Face", write_error, ErrorBody)
GENERATING = Dialect("Hugging Face", _write_generation_error, ErrorBody, _write_broken_off)
"""Of models that generate."""

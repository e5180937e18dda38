"""An error as the reply of the protocol that was spoken."""

from __future__ import annotations

import re

from serve_app.errors import ServeAppError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Header, Reply
from serve_app.ingress.protocols import huggingface, open_inference, openai, tei
from serve_app.ingress.statuses import kind_of, retry_after_s

_OF_A_MODEL = re.compile(r"^/$|/models/[^/]+$")
"""Where the Hugging Face client posts to."""


def error_reply(error: ServeAppError, dialect: Dialect, request_id: str, *headers: Header) -> Reply:
    kind, wait_s = kind_of(error), retry_after_s(error)
    if wait_s is not None:
        headers = (*headers, (b"retry-after", b"%d" % wait_s))
    return Reply(encode(dialect.write_error(error, kind, request_id)), dialect.status(kind), headers=headers)


def dialect_of(path: str) -> Dialect:
    """The protocol that a path without a route, and below any prefix, most likely meant."""
    if "/v2/" in f"{path}/":
        return open_inference.DIALECT
    if "/v1/" in f"{path}/":
        return openai.DIALECT
    return huggingface.DIALECT if _OF_A_MODEL.search(path) else tei.DIALECT

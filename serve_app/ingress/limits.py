"""Limits on one request that need no tokenizer."""

from __future__ import annotations

from serve_app.config import IngressSettings
from serve_app.errors import BatchTooLargeError, InputTooLongError
from serve_app.types import Request


def check_limits(request: Request, settings: IngressSettings) -> int:
    """Characters of all inputs, a token id counting as one.

    Raises BatchTooLargeError or InputTooLongError where a limit is passed.
    """
    count = len(request.inputs)
    if count > settings.max_client_batch_size:
        raise BatchTooLargeError(
            f"{count} inputs in one request, and {settings.max_client_batch_size} are allowed; send several requests"
        )
    lengths = [len(value) for value in request.inputs]
    longest = max(lengths)
    if longest > settings.max_text_characters:
        raise InputTooLongError(
            f"input {lengths.index(longest)} has {longest} characters, and {settings.max_text_characters} are allowed; "
            "shorten or split it"
        )
    return sum(lengths)

"""How deeply a body is nested, looked at before it is parsed."""

from __future__ import annotations

import re

import numpy as np

from serve_app.errors import MalformedRequestError

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
"""Also one that does not end, so that the search never goes back: it takes a time that is linear in the body."""

_BRACKETS = b"[]{}"
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\xff\x01\xff")
"""Up and down, as int8."""


def check_depth(raw: bytes, limit: int) -> None:
    """Raises MalformedRequestError if lists and objects stand in each other more than `limit` deep.

    What is no JSON may pass: the parser refuses it.
    """
    if raw.count(b"[") + raw.count(b"{") > limit and depth_of(raw) > limit:
        raise MalformedRequestError(f"the body is nested too deeply: more than {limit} lists and objects in each other")


def depth_of(raw: bytes) -> int:
    brackets = _STRING.sub(b"", raw).translate(None, _NOT_BRACKETS)
    if not brackets:
        return 0
    steps = np.frombuffer(brackets.translate(_STEPS), np.int8)
    return int(steps.cumsum(dtype=np.int32).max())

"""How deeply a body is nested, and in how many parts it is, looked at before it is parsed."""

from __future__ import annotations

import numpy as np

from serve_app.config import IngressSettings
from serve_app.errors import MalformedRequestError

_PARTS_OF_AN_INPUT = 4
_FURTHER_PARTS = 2**15

_BRACKETS = b"[]{}"
_IS_BRACKET = np.isin(np.arange(256), np.frombuffer(_BRACKETS, np.uint8))
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\xff\x01\xff")
"""Up and down, as int8."""


def parts_allowed(settings: IngressSettings) -> int:
    """Lists and objects in a body: some for each input, and those of a long conversation."""
    return _PARTS_OF_AN_INPUT * settings.max_client_batch_size + _FURTHER_PARTS


def check_nesting(raw: bytes, settings: IngressSettings) -> None:
    """Raises MalformedRequestError if lists and objects stand in each other too deeply, or are too many.

    Each costs a hundred times the two bytes that it may have. What is no JSON may pass: the parser refuses it.
    """
    deepest, most = settings.max_json_depth, parts_allowed(settings)
    if raw.count(b"[") + raw.count(b"{") <= min(deepest, most):
        return
    brackets = _brackets(raw)
    if _depth(brackets) > deepest:
        raise MalformedRequestError(
            f"the body is nested too deeply: more than {deepest} lists and objects in each other"
        )
    if brackets.count(b"[") + brackets.count(b"{") > most:
        raise MalformedRequestError(
            f"the body has more than {most} lists and objects, which is more than any request needs; send several"
        )


def depth_of(raw: bytes) -> int:
    return _depth(_brackets(raw))


def _brackets(raw: bytes) -> bytes:
    """Those outside of strings.

    A backslash outside of a string is no JSON, and ends the parser's work, whatever is made of it here.
    """
    if b"\\" in raw:
        raw = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    codes = np.frombuffer(raw, np.uint8)
    is_in_string = np.bitwise_xor.accumulate(codes == ord('"'))
    return codes[_IS_BRACKET[codes] & ~is_in_string].tobytes()


def _depth(brackets: bytes) -> int:
    if not brackets:
        return 0
    steps = np.frombuffer(brackets.translate(_STEPS), np.int8)
    return int(steps.cumsum(dtype=np.int32).max())

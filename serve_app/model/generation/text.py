"""Tokens to text, piece by piece: the pieces together are what decoding all tokens at once gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no whole character yet."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""Byte fallback: a run of such tokens is one character or several, or none is, which its end decides."""


_WORD_BEGINS = "\u2581"
"""How SentencePiece writes the space before a word, which decoding a token by itself leaves out."""


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


class Decoder(Protocol):
    """What is needed of a tokenizer (`tokenizers.Tokenizer` has it)."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def id_to_token(self, id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...


def text_of(token: int, decoder: Decoder) -> tuple[str, bytes | None]:
    """The text of a token within a text, a special one's too, and its bytes where they are no whole characters."""
    text, entry = decoder.decode([token], skip_special_tokens=False), decoder.id_to_token(token) or ""
    if INCOMPLETE in text:
        if _BYTE_TOKEN.fullmatch(entry):
            return text, bytes([int(entry[3:5], 16)])
        return text, bytes(map(_BYTES.__getitem__, entry)) if _BYTES.keys() >= set(entry) else None
    return (f" {text}" if entry.startswith(_WORD_BEGINS) and not text.startswith(" ") else text), None


class Detokenizer:
    """Incremental decoding of one answer, special tokens left out.

    Each token is decoded together with those of the last piece, because what a token's text is depends on its
    neighbours (spaces, characters of several bytes); what is sure is given out, the rest is held back.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[int] = []
        self._context = 0
        """Where the tokens that are decoded again begin."""
        self._given = 0
        """Where the tokens begin whose text was not given out."""
        self._context_text = ""
        self._after_byte = False
        self._sent: list[str] = []

    def push(self, token: int) -> str:
        """The text that is sure now."""
        self._tokens.append(token)
        if _BYTE_TOKEN.fullmatch(self._decoder.id_to_token(token) or ""):
            self._after_byte = True
            return ""
        if self._after_byte and not self._decoder.decode([token], skip_special_tokens=True):
            return ""  # a special token is left out, and the bytes before and after it stand together
        self._after_byte = False
        text = self._decoder.decode(self._tokens[self._context :], skip_special_tokens=True)
        if text.endswith(INCOMPLETE) or len(text) <= len(self._context_text) or not text.startswith(self._context_text):
            return ""
        piece = text[len(self._context_text) :]
        self._context, self._given = self._given, len(self._tokens)
        self._context_text = self._decoder.decode(self._tokens[self._context :], skip_special_tokens=True)
        self._sent.append(piece)
        return piece

    def finish(self) -> str:
        """What was held back."""
        whole = self._decoder.decode(self._tokens, skip_special_tokens=True)
        sent = "".join(self._sent)
        return whole[len(sent) :] if whole.startswith(sent) else ""


@dataclass(frozen=True, slots=True)
class Cut:
    """Text that may be given out; `stopped` if a stop text followed it."""

    text: str
    stopped: bool = False


class StopTexts:
    """Ends a text before the first of `stops`, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> Cut:
        if not self._stops:
            return Cut(text)
        self._held += text
        places = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if places:
            return Cut(self._held[: min(places)], stopped=True)
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Cut(out)

    def finish(self) -> str:
        """What was held back and became no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

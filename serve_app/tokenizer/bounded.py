"""A tokenizer with one way of truncation, which reads no more of a long text than decides what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.tokenizer.seams import Seams, seams_of
from serve_app.types import Side, TextPair

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_CUTTING_CHARACTERS = 6
"""Characters to read for each token that is kept: more than most words have, so that one reading mostly does."""

_COUNTING_CHARACTERS = 32
"""Many more where nothing is cut, so that the refusal tells the exact number of tokens for all but extreme texts."""

_GROWTH = 4


class BoundedTokenizer:
    """Never changed after construction, so that threads may share it: truncation is a setting of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, cut: Side | None) -> None:
        """A copy of `tokenizer` that cuts at `max_tokens` from that side, or does not cut (None)."""
        self._max_tokens = max_tokens
        self._seams: Seams | None = seams_of(tokenizer)
        self._from_end = cut == "left"
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._characters = max_tokens * (_COUNTING_CHARACTERS if cut is None else _CUTTING_CHARACTERS)
        if cut is not None:
            self._tokenizer.enable_truncation(max_length=max_tokens, direction=cut)

    def reads_all(self, characters: int) -> bool:
        """Whether a text of so many characters is sure to be tokenized in full. Pairs always are."""
        return self._seams is None or characters <= self._characters

    def encode(self, texts: Sequence[str | TextPair]) -> list[Encoding]:
        """The encodings, as far as `max_tokens`; without truncation, what is longer may be the encoding of a part.

        Releases the GIL. Raises TypeError or ValueError if a text is not valid Unicode.
        """
        return self._encode(texts, self._characters)

    def _encode(self, texts: Sequence[str | TextPair], characters: int) -> list[Encoding]:
        parts = [text if len(text) <= characters else self._part(text, characters) for text in texts]
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(parts, add_special_tokens=True)
        short = [i for i, part in enumerate(parts) if part is not texts[i] and not self._is_beyond_limit(encodings[i])]
        if short:
            longer = self._encode([texts[i] for i in short], characters * _GROWTH)
            for index, encoding in zip(short, longer, strict=True):
                encodings[index] = encoding
        return encodings

    def _part(self, text: str | TextPair, characters: int) -> str | TextPair:
        if self._seams is None or isinstance(text, tuple):
            return text
        text.encode()  # what is not valid is refused, wherever it stands
        return self._seams.end_of(text, characters) if self._from_end else self._seams.start_of(text, characters)

    def _is_beyond_limit(self, encoding: Encoding) -> bool:
        return len(encoding) > self._max_tokens or bool(encoding.overflowing)

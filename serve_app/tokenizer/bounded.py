"""A tokenizer with one way of truncation, which reads no more of a long text than decides what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve_app.tokenizer.seams import Seams, seams_of
from serve_app.tokenizer.windows import Layout, frame_of, kept
from serve_app.types import Side, TextPair

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_CUTTING_CHARACTERS = 6
"""Characters to read for each token that is kept: more than most words have, so that one reading mostly does."""

_COUNTING_CHARACTERS = 32
"""Many more where nothing is cut, so that the refusal tells the exact number of tokens for all but extreme texts."""

_GROWTH = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of an encoding; `truncated` if something was cut off."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool


class BoundedTokenizer:
    """Never changed after construction, so that threads may share it.

    The tokenizer's own truncation is not used: it makes an encoding of everything that it cuts off, and of a pair one
    for each combination of what is cut off its texts, which is memory in the square of their length.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, cut: Side | None) -> None:
        """`tokenizer` neither truncates nor pads. What has more than `max_tokens` is cut at that side, or not."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._seams: Seams | None = seams_of(tokenizer)
        self._side: Side = cut or "right"
        self._characters = max_tokens * (_COUNTING_CHARACTERS if cut is None else _CUTTING_CHARACTERS)
        self._single, self._pair = frame_of(tokenizer, "a"), frame_of(tokenizer, ("a", "a"))

    @property
    def takes_pairs(self) -> bool:
        """Whether special tokens leave room for a pair's texts."""
        return self._pair.size < self._max_tokens

    def reads_all(self, characters: int) -> bool:
        """Whether a text of so many characters is sure to be tokenized in full. Pairs always are."""
        return self._seams is None or characters <= self._characters

    def kept(self, encoding: Encoding) -> Kept:
        """The encoding, cut to `max_tokens` as transformers' `longest_first` does; of a pair only if `takes_pairs`."""
        ids, type_ids = encoding.ids, encoding.type_ids
        if len(ids) <= self._max_tokens:
            return Kept(ids, type_ids, truncated=False)
        places = kept(self._layout(encoding), self._max_tokens, "longest_first", self._side)
        return Kept(np.array(ids)[places].tolist(), np.array(type_ids)[places].tolist(), truncated=True)

    def _layout(self, encoding: Encoding) -> Layout:
        if encoding.n_sequences < 2:
            return Layout(self._single, len(encoding) - self._single.size)
        first = encoding.sequence_ids.count(0)
        return Layout(self._pair, first, len(encoding) - self._pair.size - first)

    def encode(self, texts: Sequence[str | TextPair]) -> list[Encoding]:
        """The encodings, uncut; what is longer than `max_tokens` may be the encoding of a part.

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
        return self._seams.end_of(text, characters) if self._side == "left" else self._seams.start_of(text, characters)

    def _is_beyond_limit(self, encoding: Encoding) -> bool:
        return len(encoding) > self._max_tokens

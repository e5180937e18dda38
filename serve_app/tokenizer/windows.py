"""Which tokens of an input that is too long go into which sequence.

An input is one text or two, with special tokens before, between and after (its frame). A sequence is told as the
places of its tokens in the input's whole encoding, so that everything known of a token goes where the token goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.types import Side, TextPair

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Places: TypeAlias = npt.NDArray[np.intp]
Cut: TypeAlias = Literal["longest_first", "only_first", "only_second"]


@dataclass(frozen=True, slots=True)
class Frame:
    """How many special tokens the tokenizer puts before the first text, between two, and after the last."""

    before: int = 0
    between: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        return self.before + self.between + self.after


def frame_of(tokenizer: Tokenizer, probe: str | TextPair) -> Frame:
    """The frame that this tokenizer gives to texts like `probe`, each of which has a token."""
    texts = tokenizer.encode_batch([probe], add_special_tokens=True)[0].sequence_ids
    last = 1 if isinstance(probe, tuple) else 0
    before, after = texts.index(0), texts[::-1].index(last)
    return Frame(before, texts.count(None) - before - after, after)


@dataclass(frozen=True, slots=True)
class Layout:
    """An input's whole encoding: the tokens of its texts (`second` is None where there is one), and its frame."""

    frame: Frame
    first: int
    second: int | None = None

    @property
    def length(self) -> int:
        return self.frame.size + self.first + (self.second or 0)

    def text_ids(self) -> npt.NDArray[np.int8]:
        """0 and 1 for tokens of the texts, -1 for those of the frame, (length,)."""
        frame = self.frame
        kinds = np.array([-1, 0, -1, 1, -1], np.int8)
        return np.repeat(kinds, [frame.before, self.first, frame.between, self.second or 0, frame.after])

    def longer(self) -> int:
        """0 or 1: the text that has more tokens; the second where they are equal."""
        return 0 if self.second is None or self.first > self.second else 1

    def room_for(self, text: int, limit: int) -> int:
        """Tokens of this text that fit into a sequence that has all of the other."""
        other = (self.second or 0) if text == 0 else self.first
        return limit - self.frame.size - other

    def places(self, first: range, second: range | None = None) -> Places:
        """A sequence with these tokens of the texts."""
        frame = self.frame
        second_start = frame.before + self.first + frame.between
        parts = [
            np.arange(frame.before),
            frame.before + np.arange(first.start, first.stop),
            np.arange(second_start - frame.between, second_start),
            second_start + (np.arange(0) if second is None else np.arange(second.start, second.stop)),
            np.arange(self.length - frame.after, self.length),
        ]
        return np.concatenate(parts)


def kept(layout: Layout, limit: int, cut: Cut, side: Side) -> Places:
    """The one sequence of at most `limit` tokens that is left of an input that has more, as `tokenizers` truncates.

    The text that is cut must have room for at least one token beside the other.
    """
    target = target_of(layout, cut)
    if target is None:
        first, second = _longest_first(layout.first, layout.second or 0, limit - layout.frame.size)
    elif target == 0:
        first, second = layout.room_for(0, limit), layout.second or 0
    else:
        first, second = layout.first, layout.room_for(1, limit)
    whole = layout.second
    return layout.places(_side(layout.first, first, side), None if whole is None else _side(whole, second, side))


def windows(layout: Layout, limit: int, cut: Cut, stride: int) -> Iterator[Places]:
    """Sequences of at most `limit` tokens that cover the text that is too long; neighbours share `stride` tokens.

    Of a pair, the other text is in each. `stride` must be below the room that is left.
    """
    chosen = target_of(layout, cut)
    target = layout.longer() if chosen is None else chosen
    length = layout.first if target == 0 else layout.second or 0
    for part in spans(length, layout.room_for(target, limit), stride):
        if target == 0:
            yield layout.places(part, None if layout.second is None else range(layout.second))
        else:
            yield layout.places(range(layout.first), part)


def target_of(layout: Layout, cut: Cut) -> int | None:
    """The text that is cut, or None where that depends on their lengths."""
    if layout.second is None or cut == "only_first":
        return 0
    return 1 if cut == "only_second" else None


def spans(length: int, room: int, stride: int) -> Iterator[range]:
    """Stretches of `room` that cover 0..length-1, each sharing `stride` with the one before; the last is the rest."""
    for start in range(0, length, room - stride):
        yield range(start, min(start + room, length))
        if start + room >= length:
            return


def count_spans(length: int, room: int, stride: int) -> int:
    return 1 if length <= room else -(-(length - room) // (room - stride)) + 1


def _side(length: int, count: int, side: Side) -> range:
    return range(length - count, length) if side == "left" else range(count)


def _longest_first(first: int, second: int, limit: int) -> tuple[int, int]:
    """What `tokenizers` leaves of two texts (utils/truncation.rs): the shorter one whole, or half of each."""
    short, long = min(first, second), max(first, second)
    kept_long = long if short > limit else max(short, limit - short)
    if short + kept_long > limit:
        short, kept_long = limit // 2, limit // 2 + limit % 2
    return (kept_long, short) if first > second else (short, kept_long)

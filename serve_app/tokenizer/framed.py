"""Inputs with everything that a request may ask of their tokens: windows, cut sides of pairs, places in the text.

Every text is tokenized without truncation, and sequences are made of its tokens by `windows`. So the tokenizer is never
changed, and threads may share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from serve_app.errors import InputTooLongError, InvalidInputError
from serve_app.tokenizer.chat import ChatTemplate
from serve_app.tokenizer.encoded import Encoded
from serve_app.tokenizer.seams import Seams, seams_of
from serve_app.tokenizer.token_types import TokenTypes
from serve_app.tokenizer.windows import Frame, Layout, Places, count_spans, frame_of, kept, target_of, windows
from serve_app.types import Alignment, Chat, Int32Array, TextPair, TokenIds, TokenizeRequest

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_CUTTING_CHARACTERS = 6
"""Characters to read for each token that is kept: more than most words have, so that one reading mostly does."""

_COUNTING_CHARACTERS = 32
"""Many more where nothing is cut, so that the refusal tells the exact number for all but extreme texts."""

_GROWTH = 4

Text: TypeAlias = "str | TextPair"


@dataclass(frozen=True, slots=True)
class Reading:
    """The encoding of an input, or of a part of it that has more tokens than are needed."""

    encoding: Encoding
    layout: Layout
    whole: bool = True
    skipped: int = 0
    """Characters that were left out before the part that was read."""
    part_of: int = 0
    """0 or 1: the text of which a part was read, where not all was."""


class FramedTokenizer:
    """Never changed after construction, so that threads may share it."""

    def __init__(
        self, tokenizer: Tokenizer, max_input_tokens: int, chat: ChatTemplate, token_types: TokenTypes
    ) -> None:
        """`tokenizer` neither truncates nor pads."""
        self._tokenizer = tokenizer
        self._token_types = token_types
        self._chat = chat
        self._limit = max_input_tokens
        self._seams: Seams | None = seams_of(tokenizer)
        self._vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._single, self._pair = frame_of(tokenizer, "a"), frame_of(tokenizer, ("a", "a"))

    def encode(self, request: TokenizeRequest) -> list[Encoded]:
        """One request's sequences. Raises RequestError; TypeError or ValueError if a text is not valid Unicode."""
        readings = iter(self._read_all(request))
        made: list[Encoded] = []
        windowed = 0
        for index, value in enumerate(request.inputs):
            if isinstance(value, tuple) and not (value and isinstance(value[0], str)):
                sequences = self._given(request, index, value)
            else:
                sequences = self._sequences(request, index, next(readings), windowed)
            windowed += len(sequences) if len(sequences) > 1 else 0
            self._check_windows(request, windowed)
            made.extend(sequences)
        return made

    def limit_of(self, request: TokenizeRequest) -> int:
        return self._limit if request.max_tokens is None else min(self._limit, request.max_tokens)

    def _read_all(self, request: TokenizeRequest) -> Iterator[Reading]:
        """Readings of the texts and conversations, in order."""
        texts: list[Text] = []
        framed: list[bool] = []
        for value in request.inputs:
            if isinstance(value, Chat):
                texts.append(self._chat.render(value))
                framed.append(False)
            elif isinstance(value, str) or (value and isinstance(value[0], str)):
                texts.append(prompted(request.prompt, value))
                framed.append(True)
        for frames in (True, False):
            self._check_room(request, [text for text, f in zip(texts, framed, strict=True) if f == frames], frames)
        found: dict[int, Reading] = {}
        for frames in (True, False):
            members = [i for i, f in enumerate(framed) if f == frames]
            readings = self._read(request, [texts[i] for i in members], frames, self._characters(request))
            found.update(zip(members, readings, strict=True))
        return iter([found[i] for i in range(len(texts))])

    def _characters(self, request: TokenizeRequest) -> int:
        if request.long_texts == "truncate":
            return self._needed(request) * _CUTTING_CHARACTERS
        return self._needed(request) * _COUNTING_CHARACTERS

    def _needed(self, request: TokenizeRequest) -> int:
        """Tokens of a text of which it is enough to know that there are more."""
        limit = self.limit_of(request)
        if request.long_texts != "windows":
            return limit
        pairs = any(isinstance(value, tuple) and value and isinstance(value[0], str) for value in request.inputs)
        # What a window adds to the one before it; of a pair that leaves little room, half a window.
        most_new = max(limit - request.stride, limit - limit // 2) if pairs else limit - request.stride
        return limit + request.max_windows * most_new

    def _read(self, request: TokenizeRequest, texts: Sequence[Text], frames: bool, characters: int) -> list[Reading]:
        """Releases the GIL while it tokenizes."""
        parts = [self._part(request, text, characters) for text in texts]
        encode = self._tokenizer.encode_batch if request.align else self._tokenizer.encode_batch_fast
        encodings = encode([part for part, _ in parts], add_special_tokens=frames)
        readings = [
            Reading(encoding, self._layout(encoding, text, frames), part is text, skipped, _longest(request, text))
            for encoding, text, (part, skipped) in zip(encodings, texts, parts, strict=True)
        ]
        short = [i for i, reading in enumerate(readings) if not self._is_enough(request, reading)]
        if short:
            longer = self._read(request, [texts[i] for i in short], frames, characters * _GROWTH)
            for index, reading in zip(short, longer, strict=True):
                readings[index] = reading
        return readings

    def _part(self, request: TokenizeRequest, text: Text, characters: int) -> tuple[Text, int]:
        """What to read of a text, and how many characters before it are not."""
        if isinstance(text, str):
            return self._part_of_one(request, text, characters)
        target = _longest(request, text)
        if request.cut == "longest_first":  # a part must have more tokens than the other text, all of which is read
            characters = max(characters, 2 * len(text[1 - target]))
        part, skipped = self._part_of_one(request, text[target], characters)
        if part is text[target]:
            return text, 0
        return ((part, text[1]) if target == 0 else (text[0], part)), skipped

    def _part_of_one(self, request: TokenizeRequest, text: str, characters: int) -> tuple[str, int]:
        if self._seams is None or len(text) <= characters:
            return text, 0
        text.encode()  # what is not valid is refused, wherever it stands
        if request.truncation_side == "left" and request.long_texts == "truncate":
            part = self._seams.end_of(text, characters)
            return (text, 0) if len(part) == len(text) else (part, len(text) - len(part))
        part = self._seams.start_of(text, characters)
        return (text if len(part) == len(text) else part), 0

    def _is_enough(self, request: TokenizeRequest, reading: Reading) -> bool:
        """Whether what was not read changes nothing."""
        if reading.whole:
            return True
        part, other = reading.layout.first, reading.layout.second or 0
        if reading.part_of == 1:
            part, other = other, part
        return part > self._needed(request) and (request.cut != "longest_first" or other < part)

    def _layout(self, encoding: Encoding, text: Text, frames: bool) -> Layout:
        if isinstance(text, str):
            frame = self._single if frames else Frame()
            return Layout(frame, len(encoding) - frame.size)
        first = encoding.sequence_ids.count(0)
        return Layout(self._pair, first, len(encoding) - self._pair.size - first)

    def _sequences(self, request: TokenizeRequest, index: int, reading: Reading, windowed: int) -> list[Encoded]:
        layout, limit = reading.layout, self.limit_of(request)
        if not layout.length:
            raise InvalidInputError(f"inputs[{index}]: has no tokens; send a text that is not empty")
        if layout.length <= limit:
            return [self._columns(request, index, reading).all(truncated=False)]
        if request.long_texts == "error":
            raise _too_long(index, layout.length, reading.whole, limit)
        stride = self._check_other_text(request, index, layout, limit)
        if request.long_texts == "windows":
            self._count_windows(request, reading, limit, stride, windowed)
        columns = self._columns(request, index, reading)
        if request.long_texts == "truncate":
            return [columns.take(kept(layout, limit, request.cut, request.truncation_side), truncated=True)]
        return [columns.take(places, truncated=False) for places in windows(layout, limit, request.cut, stride)]

    def _columns(self, request: TokenizeRequest, index: int, reading: Reading) -> _Columns:
        encoding = reading.encoding
        types = self._token_types.of(request, index, encoding.type_ids)
        return _Columns(
            ids=np.array(encoding.ids, np.int32),
            type_ids=None if types is None else np.array(types, np.int32),
            alignment=_alignment(request, reading) if request.align else None,
            index=index,
        )

    def _check_other_text(self, request: TokenizeRequest, index: int, layout: Layout, limit: int) -> int:
        """Raises where the text that must stay whole leaves no room; else the stride, smaller where room is small."""
        target = target_of(layout, request.cut)
        if target is None and request.long_texts == "truncate":
            return 0
        target = layout.longer() if target is None else target
        room = layout.room_for(target, limit)
        if room < 1:
            raise InputTooLongError(
                f"inputs[{index}]: its {('second', 'first')[target]} text takes all of the {limit} tokens that the "
                f"model takes, with {layout.frame.size} special tokens; shorten it"
            )
        return request.stride if request.stride < room else room // 2

    def _count_windows(
        self, request: TokenizeRequest, reading: Reading, limit: int, stride: int, windowed: int
    ) -> None:
        layout = reading.layout
        chosen = target_of(layout, request.cut)
        target = layout.longer() if chosen is None else chosen
        length = layout.first if target == 0 else layout.second or 0
        wanted = windowed + count_spans(length, layout.room_for(target, limit), stride)
        self._check_windows(request, wanted, at_least=not reading.whole)

    def _check_windows(self, request: TokenizeRequest, wanted: int, at_least: bool = False) -> None:
        if wanted > request.max_windows:
            raise InputTooLongError(
                f"inputs: {'at least ' if at_least else ''}{wanted} windows of {self.limit_of(request)} tokens are "
                f"needed, and one request may have {request.max_windows}; send less text, or ask for truncation"
            )

    def _check_room(self, request: TokenizeRequest, texts: Sequence[Text], frames: bool) -> None:
        """Raises where special tokens or what windows share leave no room for a text."""
        if not texts:
            return
        pairs = any(isinstance(text, tuple) for text in texts)
        special = (self._pair if pairs else self._single).size if frames else 0
        room = self.limit_of(request) - special
        if room < 1:
            raise InvalidInputError(
                f"{self.limit_of(request)} tokens leave no room for text beside {special} special ones; ask for more"
            )
        if request.long_texts == "windows" and not 0 <= request.stride < room:
            raise InvalidInputError(
                f"stride: {request.stride} must be 0 to {room - 1}: a window has room for {room} tokens of text"
            )

    def _given(self, request: TokenizeRequest, index: int, ids: TokenIds) -> list[Encoded]:
        """Token ids that the client made, used as they are: no special tokens are added."""
        check_ids(index, ids, self._vocab_size)
        limit, layout = self.limit_of(request), Layout(Frame(), len(ids))
        columns = _Columns(np.array(ids, np.int32), None, _unaligned(len(ids)) if request.align else None, index)
        if len(ids) <= limit:
            return [columns.all(truncated=False)]
        if request.long_texts == "error":
            raise _too_long(index, len(ids), True, limit)
        if request.long_texts == "truncate":
            return [columns.take(kept(layout, limit, "only_first", request.truncation_side), truncated=True)]
        if not 0 <= request.stride < limit:
            raise InvalidInputError(f"stride: {request.stride} must be 0 to {limit - 1}")
        self._check_windows(request, count_spans(len(ids), limit, request.stride))
        return [
            columns.take(places, truncated=False) for places in windows(layout, limit, "only_first", request.stride)
        ]


@dataclass(frozen=True, slots=True)
class _Columns:
    """What is known of each token of one input."""

    ids: Int32Array
    type_ids: Int32Array | None
    alignment: Alignment | None
    index: int

    def all(self, truncated: bool) -> Encoded:
        return Encoded(self.ids, self.type_ids, truncated, self.index, self.alignment)

    def take(self, places: Places, truncated: bool) -> Encoded:
        types = None if self.type_ids is None else self.type_ids[places]
        known = self.alignment
        aligned = known and Alignment(known.offsets[places], known.word_ids[places], known.text_ids[places])
        return Encoded(self.ids[places], types, truncated, self.index, aligned)


def check_ids(index: int, ids: TokenIds, vocab_size: int) -> None:
    """Raises InvalidInputError if a client's token ids are none of the model's."""
    if not ids:
        raise InvalidInputError(f"inputs[{index}]: has no tokens; send at least one")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InvalidInputError(f"inputs[{index}]: token ids must be 0 to {vocab_size - 1}")


def _alignment(request: TokenizeRequest, reading: Reading) -> Alignment:
    encoding, text_ids = reading.encoding, reading.layout.text_ids()
    offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    offsets[text_ids == reading.part_of] += np.int32(reading.skipped)
    offsets[text_ids == 0] -= np.int32(len(request.prompt))
    word_ids = np.array([-1 if word is None else word for word in encoding.word_ids], np.int32)
    return Alignment(np.maximum(offsets, 0), word_ids, text_ids)


def _unaligned(length: int) -> Alignment:
    """Of token ids that a client made: they stand in no text."""
    return Alignment(np.zeros((length, 2), np.int32), np.full(length, -1, np.int32), np.full(length, -1, np.int8))


def _longest(request: TokenizeRequest, text: Text) -> int:
    """0 or 1: the text that is cut if any is, as far as characters tell."""
    if isinstance(text, str) or request.cut == "only_first":
        return 0
    return 1 if request.cut == "only_second" or len(text[1]) >= len(text[0]) else 0


def prompted(prompt: str, text: Text) -> Text:
    return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])


def _too_long(index: int, tokens: int, exact: bool, limit: int) -> InputTooLongError:
    return InputTooLongError(
        f"inputs[{index}]: {'' if exact else 'at least '}{tokens} tokens, and the model takes {limit}; "
        "shorten it or ask for truncation (truncate: true)"
    )

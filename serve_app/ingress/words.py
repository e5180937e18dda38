"""Tokens of texts as clients see them, from what a tokenizer replica answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.errors import BatchTooLargeError, InvalidInputError
from serve_app.ingress.service import TextToken
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import TokenBatch, TokenIds, TokenizeRequest

Places: TypeAlias = npt.NDArray[np.intp]

MOST_TOKENS = 2**18
"""Of one answer, in whose JSON each is some 60 bytes, where it was one in the request."""


def whole_texts(texts: Sequence[str]) -> TokenizeRequest:
    """Asks for every token of every text: what is longer than the model takes comes in windows that share nothing."""
    return TokenizeRequest(tuple(texts), long_texts="windows", align=True, computed=False)


def text_tokens(
    texts: Sequence[str], batch: TokenBatch, vocabulary: Vocabulary, special_tokens: bool
) -> list[list[TextToken]]:
    """The tokens of each text; of special tokens only those before the first window and after the last.

    `batch` is the answer to `whole_texts(texts)`. Raises BatchTooLargeError if it has more than `MOST_TOKENS`.
    """
    assert batch.alignment is not None
    if len(batch.input_ids) > MOST_TOKENS:
        raise BatchTooLargeError(
            f"the texts have {len(batch.input_ids)} tokens together, and one answer has at most {MOST_TOKENS}; "
            "send several requests"
        )
    found: list[list[TextToken]] = []
    for text, windows in zip(texts, _windows(batch), strict=True):
        kept = np.concatenate([_kept(batch, window, windows, special_tokens) for window in windows])
        starts = _byte_starts(text)
        found.append([_token(text, index, batch, starts, vocabulary) for index in kept.tolist()])
    return found


def texts_of(sequences: Sequence[TokenIds], vocabulary: Vocabulary, skip_special_tokens: bool) -> list[str]:
    """The text of each sequence of token ids. Raises InvalidInputError for an id that the model does not have."""
    try:
        return [vocabulary.decode(ids, skip_special_tokens) for ids in sequences]
    except OverflowError as error:
        raise InvalidInputError("ids: a token id is too large for this model") from error


def _windows(batch: TokenBatch) -> Iterator[list[int]]:
    """The sequences of each input, in order."""
    if batch.input_of is None:
        yield from ([index] for index in range(batch.num_sequences))
        return
    for index in range(int(batch.input_of.max(initial=-1)) + 1):
        yield np.flatnonzero(batch.input_of == index).tolist()


def _kept(batch: TokenBatch, window: int, windows: Sequence[int], special_tokens: bool) -> Places:
    """Places in the batch of the tokens of one window that are the text's own, or stand around the whole text."""
    assert batch.alignment is not None
    start, stop = int(batch.cu_seqlens[window]), int(batch.cu_seqlens[window + 1])
    own = batch.alignment.text_ids[start:stop] >= 0
    places = np.flatnonzero(own)
    first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
    if special_tokens and window == windows[0]:
        own[:first] = True
    if special_tokens and window == windows[-1]:
        own[last + 1 :] = True
    kept: Places = np.flatnonzero(own) + start
    return kept


def _byte_starts(text: str) -> Places | None:
    """(characters + 1,): where each character begins in the text's UTF-8, and the last one ends; None where no
    character has several bytes.
    """
    if text.isascii():
        return None
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.intp) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, np.intp), np.cumsum(sizes)])


def _token(text: str, index: int, batch: TokenBatch, starts: Places | None, vocabulary: Vocabulary) -> TextToken:
    assert batch.alignment is not None
    token = int(batch.input_ids[index])
    if batch.alignment.text_ids[index] < 0:
        return TextToken(token, vocabulary.token(token), True, None, None)
    start, stop = batch.alignment.offsets[index].tolist()
    if starts is None:
        return TextToken(token, text[start:stop], False, start, stop)
    return TextToken(token, text[start:stop], False, int(starts[start]), int(starts[stop]))

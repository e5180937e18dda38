"""Encoded inputs on their way into one flat batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from serve_app.errors import InvalidInputError, ModelFailureError, ServeAppError
from serve_app.types import Alignment, Int32Array, TokenBatch

logger = logging.getLogger(__name__)

Tokens: TypeAlias = "Sequence[int] | Int32Array"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence's ids and, for pairs, token types; `truncated` if tokens were cut off.

    `index` is the input that it is, or is a window of; None where each input is one sequence.
    """

    ids: Tokens
    type_ids: Tokens | None = None
    truncated: bool = False
    index: int | None = None
    alignment: Alignment | None = None


Outcome: TypeAlias = list[Encoded] | ServeAppError
"""What became of one request: its inputs' encodings, or why it failed."""

_ENDS_THE_PROCESS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def own_failure(error: BaseException) -> ServeAppError:
    """What a request ends with whose encoding raised `error`, so that it fails alone.

    A panic in Rust is a BaseException and no Exception. Raises again what is about the process.
    """
    if isinstance(error, _ENDS_THE_PROCESS):
        raise error
    if isinstance(error, ServeAppError):
        return error
    if isinstance(error, (TypeError, ValueError)):
        return InvalidInputError("inputs: a text is not valid Unicode (a lone surrogate?); send valid UTF-8")
    name = type(error).__name__  # and not what it says, which may repeat the text
    logger.warning("a request could not be tokenized: %s", name)
    return ModelFailureError(f"the tokenizer failed for this input ({name})")


def flatten(outcomes: Sequence[Outcome], tokenize_s: float = 0.0) -> TokenBatch:
    """Lists of encoded inputs, one list a request, as one TokenBatch; failed requests have no sequences."""
    failures = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, ServeAppError)}
    requests = [[] if isinstance(outcome, ServeAppError) else outcome for outcome in outcomes]
    sequences = [encoded for request in requests for encoded in request]
    return TokenBatch(
        input_ids=_joined([s.ids for s in sequences]),
        cu_seqlens=_cumulative([len(s.ids) for s in sequences]),
        cu_requests=_cumulative([len(r) for r in requests]),
        truncated=np.fromiter((s.truncated for s in sequences), np.bool_, len(sequences)),
        token_type_ids=_type_ids(sequences),
        failures=failures,
        tokenize_s=tokenize_s,
        input_of=_input_of(requests),
        alignment=_alignment(sequences),
    )


def _joined(lists: Sequence[Tokens]) -> Int32Array:
    if any(isinstance(part, np.ndarray) for part in lists):
        return np.concatenate([np.asarray(part, np.int32) for part in lists])
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, sum(map(len, lists)))


def _cumulative(lengths: Sequence[int]) -> Int32Array:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(np.asarray(lengths, np.int32), dtype=np.int32)])


def _type_ids(sequences: Sequence[Encoded]) -> Int32Array | None:
    if all(s.type_ids is None for s in sequences):
        return None
    return _joined([s.type_ids if s.type_ids is not None else [0] * len(s.ids) for s in sequences])


def _input_of(requests: Sequence[list[Encoded]]) -> Int32Array | None:
    if all(encoded.index is None for request in requests for encoded in request):
        return None
    indices = [
        i if encoded.index is None else encoded.index for request in requests for i, encoded in enumerate(request)
    ]
    return np.array(indices, np.int32)


def _alignment(sequences: Sequence[Encoded]) -> Alignment | None:
    if all(s.alignment is None for s in sequences):
        return None
    parts = [_none_for(len(s.ids)) if s.alignment is None else s.alignment for s in sequences]
    return Alignment(
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.word_ids for part in parts]),
        np.concatenate([part.text_ids for part in parts]),
    )


def _none_for(length: int) -> Alignment:
    return Alignment(np.zeros((length, 2), np.int32), np.full(length, -1, np.int32), np.full(length, -1, np.int8))

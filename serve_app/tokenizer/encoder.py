"""Texts to token ids with the fast (Rust) tokenizer; synchronous and free of Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from serve_app.errors import ConfigError, InputTooLongError, InvalidInputError, RequestError
from serve_app.tokenizer.bounded import BoundedTokenizer
from serve_app.tokenizer.loader import load
from serve_app.types import Int32Array, LongTexts, Side, TextInput, TextPair, TokenBatch, TokenIds, TokenizeRequest

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input's ids and, for pairs, token types; `truncated` if tokens were cut off."""

    ids: Sequence[int]
    type_ids: Sequence[int] | None = None
    truncated: bool = False


Outcome: TypeAlias = list[Encoded] | RequestError
"""What became of one request: its inputs' encodings, or why it failed."""


class Encoder:
    """Encodes the requests of one call; may be used from several threads at once."""

    def __init__(self, path: Path, max_input_tokens: int) -> None:
        """Load the tokenizer of the model in `path`.

        Raises IncompleteModelError if no fast one can be made, ConfigError if the limit leaves no room for a text.
        """
        self.max_input_tokens = max_input_tokens
        tokenizer = load(path)
        _check_room(tokenizer, max_input_tokens)
        self.definition: str = tokenizer.to_str()
        self._vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._whole = BoundedTokenizer(tokenizer, max_input_tokens, None)
        self._cutting = {
            "left": BoundedTokenizer(tokenizer, max_input_tokens, "left"),
            "right": BoundedTokenizer(tokenizer, max_input_tokens, "right"),
        }

    def encode(self, requests: Sequence[TokenizeRequest]) -> TokenBatch:
        """One flat batch of all sequences; a request that cannot be encoded fails alone."""
        started = time.perf_counter()
        outcomes: list[Outcome] = [[] for _ in requests]
        for members in _alike(requests):
            for index, outcome in zip(members, self._encode_alike([requests[i] for i in members]), strict=True):
                outcomes[index] = outcome
        return flatten(outcomes, time.perf_counter() - started)

    def _encode_alike(self, requests: Sequence[TokenizeRequest]) -> list[Outcome]:
        """One call into Rust for requests with the same truncation; a failure is narrowed down to its request."""
        texts = [_texts(request) for request in requests]
        try:
            encodings = iter(self._tokenizer(requests[0]).encode(list(itertools.chain.from_iterable(texts))))
        except (TypeError, ValueError):
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._encode_alike([request])]
            return [InvalidInputError("inputs: a text is not valid Unicode (a lone surrogate?); send valid UTF-8")]
        return [
            self._outcome(request, list(itertools.islice(encodings, len(mine))))
            for request, mine in zip(requests, texts, strict=True)
        ]

    def _tokenizer(self, request: TokenizeRequest) -> BoundedTokenizer:
        return self._cutting[request.truncation_side] if request.long_texts == "truncate" else self._whole

    def _outcome(self, request: TokenizeRequest, encodings: Sequence[Encoding]) -> Outcome:
        texts = iter(encodings)
        try:
            return [
                self._given(request, i, _ids(value)) if _is_ids(value) else self._encoded(request, i, next(texts))
                for i, value in enumerate(request.inputs)
            ]
        except RequestError as error:
            return error

    def _encoded(self, request: TokenizeRequest, index: int, encoding: Encoding) -> Encoded:
        ids = encoding.ids
        if len(ids) > self.max_input_tokens:
            characters = len(request.prompt) + len(request.inputs[index])
            exact = self._whole.reads_all(characters)
            raise self._too_long(index, f"{len(ids)}" if exact else f"at least {len(ids)}")
        if not ids:
            raise InvalidInputError(f"inputs[{index}]: has no tokens; send a text that is not empty")
        pair = isinstance(request.inputs[index], tuple)
        cut = request.long_texts == "truncate" and len(ids) == self.max_input_tokens and bool(encoding.overflowing)
        return Encoded(ids, encoding.type_ids if pair else None, cut)

    def _given(self, request: TokenizeRequest, index: int, ids: TokenIds) -> Encoded:
        """Token ids that the client made, used as they are: no special tokens are added."""
        if not ids:
            raise InvalidInputError(f"inputs[{index}]: has no tokens; send at least one")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise InvalidInputError(f"inputs[{index}]: token ids must be 0 to {self._vocab_size - 1}")
        limit = self.max_input_tokens
        if len(ids) <= limit:
            return Encoded(ids)
        if request.long_texts != "truncate":
            raise self._too_long(index, f"{len(ids)}")
        return Encoded(ids[-limit:] if request.truncation_side == "left" else ids[:limit], truncated=True)

    def _too_long(self, index: int, tokens: str) -> InputTooLongError:
        return InputTooLongError(
            f"inputs[{index}]: {tokens} tokens, and the model takes {self.max_input_tokens}; "
            "shorten it or ask for truncation (truncate: true)"
        )


def flatten(outcomes: Sequence[Outcome], tokenize_s: float = 0.0) -> TokenBatch:
    """Lists of encoded inputs, one list a request, as one TokenBatch; failed requests have no sequences."""
    failures = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, RequestError)}
    requests = [[] if isinstance(outcome, RequestError) else outcome for outcome in outcomes]
    sequences = [encoded for request in requests for encoded in request]
    return TokenBatch(
        input_ids=_joined([s.ids for s in sequences]),
        cu_seqlens=_cumulative([len(s.ids) for s in sequences]),
        cu_requests=_cumulative([len(r) for r in requests]),
        truncated=np.fromiter((s.truncated for s in sequences), np.bool_, len(sequences)),
        token_type_ids=_type_ids(sequences),
        failures=failures,
        tokenize_s=tokenize_s,
    )


def _joined(lists: Sequence[Sequence[int]]) -> Int32Array:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, sum(map(len, lists)))


def _cumulative(lengths: Sequence[int]) -> Int32Array:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(np.asarray(lengths, np.int32), dtype=np.int32)])


def _type_ids(sequences: Sequence[Encoded]) -> Int32Array | None:
    if all(s.type_ids is None for s in sequences):
        return None
    return _joined([s.type_ids if s.type_ids is not None else [0] * len(s.ids) for s in sequences])


def _alike(requests: Sequence[TokenizeRequest]) -> list[list[int]]:
    """Indices of the requests, grouped by how they are truncated."""
    kinds: dict[tuple[LongTexts, Side], list[int]] = {}
    for index, request in enumerate(requests):
        kinds.setdefault((request.long_texts, request.truncation_side), []).append(index)
    return list(kinds.values())


def _is_ids(value: TextInput) -> bool:
    return isinstance(value, tuple) and not (value and isinstance(value[0], str))


def _ids(value: TextInput) -> TokenIds:
    return cast("TokenIds", value)


def _texts(request: TokenizeRequest) -> list[str | TextPair]:
    """The inputs that need the tokenizer, the prompt before each (before the first text of a pair)."""
    if not request.prompt:
        return [cast("str | TextPair", v) for v in request.inputs if not _is_ids(v)]
    prompted: list[str | TextPair] = []
    for value in request.inputs:
        if isinstance(value, str):
            prompted.append(request.prompt + value)
        elif not _is_ids(value):
            first, second = cast("TextPair", value)
            prompted.append((request.prompt + first, second))
    return prompted


def _check_room(tokenizer: Tokenizer, max_input_tokens: int) -> None:
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_input_tokens <= special:
        raise ConfigError(f"max_input_tokens: {max_input_tokens} leaves no room beside {special} special tokens")

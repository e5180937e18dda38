"""Texts to token ids with the fast (Rust) tokenizer; synchronous and free of Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from serve_app.errors import ConfigError, IncompleteModelError, InputTooLongError, InvalidInputError
from serve_app.tasks.card import transformer_folder
from serve_app.tasks.input_embedding import embedding_rows
from serve_app.tasks.stock_tokenizer import StockTokenizer, read_stock_tokenizer
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.tokenizer.bounded import BoundedTokenizer
from serve_app.tokenizer.chat import ChatTemplate
from serve_app.tokenizer.encoded import Encoded, Outcome, flatten, own_failure
from serve_app.tokenizer.framed import FramedTokenizer, check_ids, prompted
from serve_app.tokenizer.known_ids import KnownIds
from serve_app.tokenizer.token_types import TokenTypes
from serve_app.types import LongTexts, Side, TextInput, TextPair, TokenBatch, TokenIds, TokenizeRequest

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["Encoded", "Encoder", "Outcome", "flatten"]


class Encoder:
    """Encodes the requests of one call; may be used from several threads at once."""

    def __init__(self, path: Path, max_input_tokens: int, stock: StockTokenizer | None = None) -> None:
        """Load the tokenizer of the model in `path`; `stock` is what was read of it already.

        Raises IncompleteModelError if no fast one can be made, ConfigError if the limit leaves no room for a text.
        """
        from tokenizers import Tokenizer

        self.max_input_tokens = max_input_tokens
        stock, folder = stock or read_stock_tokenizer(path), transformer_folder(path)
        if stock.definition is None:
            raise IncompleteModelError(f"{folder.name}: transformers has its tokenizer in Python only")
        tokenizer = Tokenizer.from_str(stock.definition)
        _check_room(tokenizer, max_input_tokens)
        model_ids = embedding_rows(folder)
        self.definition: str = Vocabulary.define(stock, model_ids)
        self.token_types = TokenTypes(tokenizer, stock)
        self._chat = ChatTemplate(folder)
        self._vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._known = KnownIds(folder, tokenizer.get_vocab(with_added_tokens=True), model_ids)
        self._whole = BoundedTokenizer(tokenizer, max_input_tokens, None)
        self._cutting = {
            "left": BoundedTokenizer(tokenizer, max_input_tokens, "left"),
            "right": BoundedTokenizer(tokenizer, max_input_tokens, "right"),
        }
        self._framed = FramedTokenizer(tokenizer, max_input_tokens, self._chat, self.token_types)

    def load_chat_template(self) -> None:
        """Before the first conversation, which would have to wait for it."""
        self._chat.load()

    def encode(self, requests: Sequence[TokenizeRequest]) -> TokenBatch:
        """One flat batch of all sequences; a request that cannot be encoded fails alone."""
        started = time.perf_counter()
        outcomes: list[Outcome] = [[] for _ in requests]
        plain = [i for i, request in enumerate(requests) if self._is_plain(request)]
        for index in sorted(set(range(len(requests))) - set(plain)):
            outcomes[index] = self._encode_framed(requests[index])
        for members in _alike(requests, plain):
            for index, outcome in zip(members, self._encode_alike([requests[i] for i in members]), strict=True):
                outcomes[index] = outcome
        outcomes = self._known.checked(requests, outcomes)
        return flatten(outcomes, time.perf_counter() - started)

    def _is_plain(self, request: TokenizeRequest) -> bool:
        """Whether all can go in one call with other requests, which is the quickest."""
        if request.long_texts == "windows" or request.align or request.max_tokens is not None:
            return False
        return all(
            isinstance(value, str) or _is_ids(value) or self._is_plain_pair(request, value) for value in request.inputs
        )

    def _is_plain_pair(self, request: TokenizeRequest, value: TextInput) -> bool:
        """Of longer ones only a part is read, which is not done here."""
        if not isinstance(value, tuple) or request.cut != "longest_first":
            return False
        bounded, characters = self._tokenizer(request), sum(map(len, cast("TextPair", value)))
        return bounded.takes_pairs and bounded.reads_all(len(request.prompt) + characters)

    def _encode_framed(self, request: TokenizeRequest) -> Outcome:
        try:
            return self._framed.encode(request)
        except BaseException as error:
            return own_failure(error)

    def _encode_alike(self, requests: Sequence[TokenizeRequest]) -> list[Outcome]:
        """One call into Rust for requests with the same truncation; a failure is narrowed down to its request."""
        texts = [_texts(request) for request in requests]
        try:
            encodings = iter(self._tokenizer(requests[0]).encode(list(itertools.chain.from_iterable(texts))))
        except BaseException as error:
            if len(requests) == 1:
                return [own_failure(error)]
            middle = len(requests) // 2
            return [*self._encode_alike(requests[:middle]), *self._encode_alike(requests[middle:])]
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
        except BaseException as error:
            return own_failure(error)

    def _encoded(self, request: TokenizeRequest, index: int, encoding: Encoding) -> Encoded:
        length = len(encoding)
        if length > self.max_input_tokens and request.long_texts != "truncate":
            exact = self._whole.reads_all(len(request.prompt) + len(request.inputs[index]))
            raise self._too_long(index, f"{length}" if exact else f"at least {length}")
        if not length:
            raise InvalidInputError(f"inputs[{index}]: has no tokens; send a text that is not empty")
        kept = self._tokenizer(request).kept(encoding)
        types = self.token_types.of(request, index, kept.type_ids)
        return Encoded(kept.ids, types, kept.truncated)

    def _given(self, request: TokenizeRequest, index: int, ids: TokenIds) -> Encoded:
        """Token ids that the client made, used as they are: no special tokens are added."""
        check_ids(index, ids, self._vocab_size)
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


def _alike(requests: Sequence[TokenizeRequest], members: Sequence[int]) -> list[list[int]]:
    """Indices of the requests, grouped by how they are truncated."""
    kinds: dict[tuple[LongTexts, Side], list[int]] = {}
    for index in members:
        request = requests[index]
        kinds.setdefault((request.long_texts, request.truncation_side), []).append(index)
    return list(kinds.values())


def _is_ids(value: TextInput) -> bool:
    return isinstance(value, tuple) and not (value and isinstance(value[0], str))


def _ids(value: TextInput) -> TokenIds:
    return cast("TokenIds", value)


def _texts(request: TokenizeRequest) -> list[str | TextPair]:
    """The inputs that need the tokenizer, the prompt before each (before the first text of a pair)."""
    return [prompted(request.prompt, cast("str | TextPair", value)) for value in request.inputs if not _is_ids(value)]


def _check_room(tokenizer: Tokenizer, max_input_tokens: int) -> None:
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_input_tokens <= special:
        raise ConfigError(f"max_input_tokens: {max_input_tokens} leaves no room beside {special} special tokens")

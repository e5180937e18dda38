"""Texts to token ids with a tokenizer that transformers has in Python only (Marian): one text after the other.

It says what the ids are and no more: where tokens stand in the text, windows and pairs need the fast kind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError, InputTooLongError, InvalidInputError
from serve_app.tasks.card import transformer_folder
from serve_app.tasks.input_embedding import embedding_rows
from serve_app.tasks.stock_tokenizer import load_stock_tokenizer
from serve_app.tokenizer.chat import ChatTemplate
from serve_app.tokenizer.encoded import Encoded, Outcome, flatten, own_failure
from serve_app.tokenizer.framed import check_ids
from serve_app.tokenizer.known_ids import KnownIds
from serve_app.types import Chat, TextInput, TokenBatch, TokenizeRequest


class SlowEncoder:
    """Encodes the requests of one call as `Encoder` does; may be used from several threads, which take turns."""

    definition = ""
    """There is none: the vocabulary cannot be used without the tokenizer."""

    def __init__(self, path: Path, max_input_tokens: int) -> None:
        """Raises IncompleteModelError if no tokenizer can be made, ConfigError if the limit leaves no room."""
        self.max_input_tokens = max_input_tokens
        self._tokenizer: Any = load_stock_tokenizer(path)
        self._turn = threading.Lock()
        folder = transformer_folder(path)
        self._chat = ChatTemplate(folder)
        self._known = KnownIds(folder, self._tokenizer.get_vocab(), embedding_rows(folder))
        self._special = int(self._tokenizer.num_special_tokens_to_add())
        if max_input_tokens <= self._special:
            raise ConfigError(f"max_input_tokens: {max_input_tokens} leaves no room beside special tokens")

    def load_chat_template(self) -> None:
        """Before the first conversation, which would have to wait for it."""
        self._chat.load()

    def encode(self, requests: Sequence[TokenizeRequest]) -> TokenBatch:
        """One flat batch of all sequences; a request that cannot be encoded fails alone."""
        started = time.perf_counter()
        outcomes = self._known.checked(requests, [self._outcome(request) for request in requests])
        return flatten(outcomes, time.perf_counter() - started)

    def _outcome(self, request: TokenizeRequest) -> Outcome:
        try:
            if request.long_texts == "windows" or request.align:
                raise InvalidInputError(
                    "this model's tokenizer has no fast form, which windows and places of tokens need"
                )
            return [self._encoded(request, index, value) for index, value in enumerate(request.inputs)]
        except BaseException as error:
            return own_failure(error)

    def _encoded(self, request: TokenizeRequest, index: int, value: TextInput) -> Encoded:
        framed = isinstance(value, str)
        ids = self._ids(request, index, value)
        limit = self.max_input_tokens if request.max_tokens is None else min(self.max_input_tokens, request.max_tokens)
        room = limit - (self._special if framed else 0)
        if len(ids) > room and request.long_texts == "error":
            raise InputTooLongError(
                f"inputs[{index}]: {len(ids) + limit - room} tokens, and the model takes {limit}; "
                "shorten it or ask for truncation (truncate: true)"
            )
        cut = len(ids) > room
        if cut:
            ids = ids[len(ids) - room :] if request.truncation_side == "left" else ids[:room]
        if framed:
            ids = self._tokenizer.build_inputs_with_special_tokens(ids)
        if not ids:
            raise InvalidInputError(f"inputs[{index}]: has no tokens; send a text that is not empty")
        return Encoded(ids, truncated=cut)

    def _ids(self, request: TokenizeRequest, index: int, value: TextInput) -> list[int]:
        """Without special tokens, but for those that a client or a chat template wrote itself."""
        if isinstance(value, str):
            return self._read(request.prompt + value)
        if isinstance(value, Chat):
            return self._read(self._chat.render(value))
        ids = [part for part in value if isinstance(part, int)]
        if len(ids) != len(value):
            raise InvalidInputError(f"inputs[{index}]: this model's tokenizer takes single texts, not pairs")
        check_ids(index, tuple(ids), len(self._tokenizer))
        return ids

    def _read(self, text: str) -> list[int]:
        text.encode()  # what is not valid Unicode is refused
        with self._turn:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

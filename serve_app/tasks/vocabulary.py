"""A model's vocabulary, for tasks whose answers hold words: token ids to text and back, in the ingress.

It is the model's tokenizer, which a tokenizer replica hands over once; texts are never encoded with it here but for
single words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Vocabulary:
    """Token ids to text and back. Never changed after construction; calls are short."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def read(cls, definition: str) -> Vocabulary:
        """From the JSON of a `tokenizer.json`."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(definition))

    def token(self, token_id: int) -> str:
        """The entry itself, marks of the tokenizer included (`##ing`, `Ġthe`); empty if there is none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens, as transformers' `decode` without cleaning up."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def join(self, tokens: Sequence[str]) -> str:
        """The text of vocabulary entries, as transformers' `convert_tokens_to_string`."""
        decoder = self._tokenizer.decoder
        text: str = " ".join(tokens) if decoder is None else decoder.decode(list(tokens))
        return text

    def first_id(self, text: str) -> int | None:
        """The first token of a text without special tokens; None if it has none."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return int(ids[0]) if ids else None

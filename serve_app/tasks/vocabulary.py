"""A model's vocabulary, for tasks whose answers hold words: token ids to text and back, in the ingress.

It is the model's tokenizer, which a tokenizer replica hands over once; texts are never encoded with it here but for
single words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.tasks.stock_tokenizer import StockTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"))
_CLEANED_CONTRACTIONS = ((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


class Vocabulary:
    """Token ids to text and back. Never changed after construction; calls are short."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        clean_up: bool = False,
        unknown_id: int | None = None,
        pad_id: int | None = None,
        model_ids: int | None = None,
        mask_id: int | None = None,
    ) -> None:
        """`model_ids`: how many ids the model knows, where its files say."""
        self._tokenizer = tokenizer
        self._cleans_up = clean_up and type(tokenizer.model).__name__ != "BPE"
        self.unknown_id = unknown_id
        self.pad_id = pad_id
        self.model_ids = model_ids
        self.mask_id = mask_id

    @classmethod
    def read(cls, definition: str) -> Vocabulary:
        """From what `define` made."""
        from tokenizers import Tokenizer

        parts = json.loads(definition)
        tokenizer = Tokenizer.from_str(parts["tokenizer"])
        return cls(
            tokenizer,
            parts["clean_up"],
            parts["unknown_id"],
            parts["pad_id"],
            model_ids=parts["model_ids"],
            mask_id=parts["mask_id"],
        )

    @staticmethod
    def define(stock: StockTokenizer, model_ids: int | None) -> str:
        """All that `read` needs, as one text; `stock` has a fast form."""
        parts = {
            "tokenizer": stock.definition,
            "clean_up": stock.cleans_up,
            "unknown_id": stock.unk_token_id,
            "pad_id": stock.pad_token_id,
            "model_ids": model_ids,
            "mask_id": stock.mask_token_id,
        }
        return json.dumps(parts)

    @functools.cached_property
    def marks_subwords(self) -> bool:
        """Whether tokens inside a word are marked as such (`##ing`)."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def token(self, token_id: int) -> str:
        """The entry itself, marks of the tokenizer included (`##ing`, `Ġthe`); empty if there is none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens, as transformers' `decode`."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self._cleans_up else text

    def join(self, tokens: Sequence[str]) -> str:
        """The text of vocabulary entries, as transformers' `convert_tokens_to_string`."""
        decoder = self._tokenizer.decoder
        text: str = " ".join(tokens) if decoder is None else decoder.decode(list(tokens))
        return text

    def first_id(self, text: str) -> int | None:
        """The first token of a text without special tokens; None if it has none. Releases the GIL."""
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return int(ids[0]) if ids else None


def _clean_up(text: str) -> str:
    for spaced, joined in (*_CLEANED, *_CLEANED_CONTRACTIONS):
        text = text.replace(spaced, joined)
    return text

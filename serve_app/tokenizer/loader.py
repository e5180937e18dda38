"""A model's fast (Rust) tokenizer, from the model's files.

`tokenizer.json` says what the tokens are. Where `tokenizer_config.json` names a class of its own and contradicts it,
the latter wins, as in transformers (tokenization_bert.py and tokenization_roberta.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from serve_app.errors import IncompleteModelError
from serve_app.tasks.card import transformer_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GENERIC_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that take tokenizer.json as it is."""

_NORMALIZER_KEYS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def load(path: Path) -> Tokenizer:
    """The tokenizer of the model in `path`, without padding and truncation, which its file may ask for.

    Raises IncompleteModelError if no fast one can be made.
    """
    from tokenizers import Tokenizer

    folder = transformer_folder(path)
    file = folder / "tokenizer.json"
    tokenizer = _configured(Tokenizer.from_file(str(file)), folder) if file.is_file() else _converted(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _configured(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import ByteLevel

    config = _config(folder)
    if config.get("tokenizer_class") in _GENERIC_CLASSES:
        return tokenizer
    if isinstance(tokenizer.normalizer, BertNormalizer):
        for key, attribute in _NORMALIZER_KEYS.items():
            if key in config:
                setattr(tokenizer.normalizer, attribute, config[key])
    if isinstance(tokenizer.pre_tokenizer, ByteLevel) and "add_prefix_space" in config:
        tokenizer.pre_tokenizer.add_prefix_space = config["add_prefix_space"]
    return tokenizer


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / "tokenizer_config.json"
    return cast("Mapping[str, Any]", json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def _converted(folder: Path) -> Tokenizer:
    """A tokenizer that ships without tokenizer.json, converted by transformers."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True).backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise _impossible(folder) from error
    # Without any vocabulary file transformers makes a tokenizer that knows its special tokens only.
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):
        raise _impossible(folder)
    return cast("Tokenizer", tokenizer)


def _impossible(folder: Path) -> IncompleteModelError:
    return IncompleteModelError(f"{folder.name}: no fast tokenizer can be made from the model's files")

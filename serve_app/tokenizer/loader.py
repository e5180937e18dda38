"""A model's tokenizer, from the model's files: the fast one (Rust), or transformers' own where there is no other.

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

_MOST_REASON = 300
"""Characters of what went wrong that are told."""


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


def slow_tokenizer(path: Path) -> Any | None:
    """The tokenizer in `path`, as transformers has it, if transformers has none in Rust for its kind (Marian).

    None where `load` makes one. Raises IncompleteModelError if none at all can be made.
    """
    folder = transformer_folder(path)
    if (folder / "tokenizer.json").is_file():
        return None
    tokenizer = _from_files(folder)
    return None if hasattr(tokenizer, "backend_tokenizer") else tokenizer


def _converted(folder: Path) -> Tokenizer:
    """A tokenizer that ships without tokenizer.json, converted by transformers."""
    found = _from_files(folder)
    tokenizer = getattr(found, "backend_tokenizer", None)
    if tokenizer is None:
        raise _impossible(folder, f"transformers has {type(found).__name__} in Python only")
    # Without any vocabulary file transformers makes a tokenizer that knows its special tokens only.
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):
        raise _impossible(folder, "no vocabulary is among them")
    return cast("Tokenizer", tokenizer)


def _from_files(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers reads files of many kinds, and raises what their readers raise
        raise _impossible(folder, f"{type(error).__name__}: {error}") from error


def _impossible(folder: Path, reason: str) -> IncompleteModelError:
    why = " ".join(reason.split())[:_MOST_REASON]
    return IncompleteModelError(f"{folder.name}: no tokenizer can be made from the model's files: {why}")

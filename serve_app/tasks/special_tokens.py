"""Which token ids have a meaning of their own, from the tokenizer's files as JSON.

`tokenizer_config.json` and `special_tokens_map.json` name the tokens. Files that do not leave them to the class of the
tokenizer, whose names are the well-known ones. The ids are those of the added tokens in the same files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from serve_app.errors import IncompleteModelError
from serve_app.tasks.input_embedding import embedding_rows

Json: TypeAlias = Mapping[str, Any]

_USUAL: Mapping[str, tuple[str, ...]] = {
    "mask_token": ("[MASK]", "<mask>"),
    "cls_token": ("[CLS]",),
    "unk_token": ("[UNK]", "<unk>"),
    "pad_token": ("[PAD]", "<pad>"),
    "eos_token": (),
    "eot_token": (),
}


_BEGIN_WITH_S = (
    *("roberta", "robertaprelayernorm", "xlmroberta", "xlmrobertaxl", "camembert", "data2vectext", "ibert", "xmod"),
    *("longformer", "led", "mpnet", "bart", "mbart", "mbart50", "mvp", "barthez", "bartpho", "plbart", "blenderbot"),
    *("luke", "mluke"),
)
"""Kinds of tokenizers whose `cls_token` is `<s>` where their files do not say; of others (Llama) it is none."""


class SpecialTokens:
    """The special tokens of the tokenizer in one folder."""

    def __init__(self, folder: Path) -> None:
        """Raises IncompleteModelError if a file is no JSON object."""
        self._names = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
        self._ids = dict(_added(folder))
        self._model = _read(folder / "config.json")
        self._folder = folder

    @property
    def cleans_up(self) -> bool:
        """`clean_up_tokenization_spaces`, which transformers' `decode` follows."""
        return bool(self._names.get("clean_up_tokenization_spaces", False))

    @property
    def names_no_token_types(self) -> bool:
        """Whether `model_input_names` is there and leaves out token types, which the model is then not to be given."""
        names = self._names.get("model_input_names")
        return isinstance(names, list) and "token_type_ids" not in names

    def id_of(self, role: str) -> int | None:
        """The id of a token that the files name, as `mask_token` or `eos_token`; None if there is none."""
        named = self._names.get(role)
        content = named.get("content") if isinstance(named, dict) else named
        names = (content,) if isinstance(content, str) else self._usual(role)
        return next((self._ids[name] for name in names if name in self._ids), None)

    def _usual(self, role: str) -> tuple[str, ...]:
        return (*_USUAL[role], "<s>") if role == "cls_token" and self._kind in _BEGIN_WITH_S else _USUAL[role]

    @property
    def _kind(self) -> str:
        """The tokenizer's, as its class is called in transformers; by the model's where its files name no class."""
        named = str(self._names.get("tokenizer_class") or self._model.get("model_type") or "").lower()
        return named.removesuffix("fast").removesuffix("tokenizer").replace("-", "").replace("_", "")

    @functools.cached_property
    def model_ids(self) -> int | None:
        """How many ids the model knows, where its files say; the tokenizer may have more."""
        return embedding_rows(self._folder)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer comes with a template for conversations."""
    return (folder / "chat_template.jinja").is_file() or bool(
        _read(folder / "tokenizer_config.json").get("chat_template")
    )


def _added(folder: Path) -> Iterator[tuple[str, int]]:
    """Content and id of each added token: those of tokenizer.json where it is there."""
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    yield from ((str(token["content"]), int(key)) for key, token in decoder.items())
    tokens = _read(folder / "tokenizer.json").get("added_tokens") or []
    yield from ((str(token["content"]), int(token["id"])) for token in tokens)
    file = folder / "vocab.txt"
    if not tokens and not decoder and file.is_file():
        yield from ((line, i) for i, line in enumerate(file.read_text("utf-8").splitlines()) if line.startswith("["))


def _read(file: Path) -> Json:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IncompleteModelError(f"{file.parent.name}/{file.name} cannot be read as JSON: {error}") from error
    return value if isinstance(value, dict) else {}

"""How many token ids a model's input embedding has, from the model's files: no torch, no transformers.

A tokenizer may have more, where tokens were added to it and `resize_token_embeddings` was not called. The headers of
the safetensors tell the shapes of the weights; config.json is what there is beside pickled ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from serve_app.tasks.json_files import read_object

_TABLES = frozenset(
    {
        "embed_in",
        "embed_tokens",
        "shared",
        "tok_embeddings",
        "token_embedding",
        "tokens_embed",
        "word_embedding",
        "word_embeddings",
        "wte",
    }
)
"""What the families of transformers call the table of token embeddings."""

_SIZES = ("vocab_size", "n_words", "src_vocab_size")
"""Keys of config.json; the last one is for the texts that a translation model (FSMT) reads."""

_PARTS = ("text_config", "llm_config", "encoder")
"""Where the config of a model of several parts has that of the part which reads texts."""

_INDEX = "model.safetensors.index.json"


def embedding_rows(folder: Path) -> int | None:
    """Token ids 0 to `embedding_rows(folder)` - 1 are the model's; None where its files do not tell.

    Of several numbers it is the largest, so that nothing which the model knows is refused: a config may leave out rows
    that a family adds, or belong to another part of the model. What is too large, a model replica finds out itself.

    Raises IncompleteModelError where a JSON file is broken.
    """
    tables = dict(_tables(folder))
    encoder = {name: rows for name, rows in tables.items() if "decoder" not in name.split(".")}
    return max((*(encoder or tables).values(), *_configured(read_object(folder / "config.json"))), default=None)


def _tables(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and rows of each tensor that may be an embedding of tokens."""
    for file in _weights(folder):
        with suppress(OSError, SafetensorError):  # whoever loads the weights tells of it
            yield from _tables_in(file)


def _tables_in(file: Path) -> Iterator[tuple[str, int]]:
    with safe_open(str(file), "np") as weights:
        for name in filter(_is_table, weights.keys()):
            shape = weights.get_slice(name).get_shape()
            if len(shape) == 2:
                yield name, int(shape[0])


def _weights(folder: Path) -> Iterable[Path]:
    """The files of weights that may hold such a table."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    parts = read_object(folder / _INDEX).get("weight_map")
    return sorted({folder / str(file) for name, file in parts.items() if _is_table(name)}) if parts else []


def _is_table(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _TABLES


def _configured(config: Mapping[str, Any]) -> Iterator[int]:
    for part in (config, *(config.get(name) for name in _PARTS)):
        if isinstance(part, dict):
            yield from (size for key in _SIZES if isinstance(size := part.get(key), int))

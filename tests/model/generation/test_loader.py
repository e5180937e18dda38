"""Generating models as they are loaded from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, InvalidInputError
from serve_app.model.generation.languages import in_language, language_token
from serve_app.model.generation.loader import load, most_kv_tokens
from serve_app.options import GenerationOptions
from tests.model.generation.models import tiny, tokenizer


def saved(model_type: str, folder: Path) -> Path:
    tiny(model_type).save_pretrained(folder)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), model_max_length=64, eos_token="</s>")
    words.save_pretrained(folder)
    return folder


def config(**keys: object) -> ModelConfig:
    return ModelConfig(name="tiny", source="./tiny", device="cpu", **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model_type", "window"), [("gpt2", 64), ("bart", 64), ("t5", None)])
def test_a_family_is_loaded_with_its_window_and_runs_by_steps(
    model_type: str, window: int | None, tmp_path: Path
) -> None:
    loaded = load(saved(model_type, tmp_path), config())
    assert (loaded.mode, loaded.window) == ("by steps", window)
    assert loaded.model.dtype == torch.float32
    assert loaded.special


def test_memory_for_a_token_is_what_its_keys_and_values_take(tmp_path: Path) -> None:
    loaded = load(saved("llama", tmp_path), config())
    assert loaded.bytes_per_token == 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, bytes
    assert most_kv_tokens(loaded, max_sequences=4) == 4 * 2 * 64


def test_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedding"):
        load(saved("gpt2", tmp_path), config(task="embedding"))


def test_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        load(saved("gpt2", tmp_path), config(dtype="int8"))


class Languages:
    """A vocabulary of two languages, and of `</s>` as token 2."""

    def token_to_id(self, token: str) -> int | None:
        return {"fra_Latn": 10, "__en__": 11}.get(token)


def test_a_language_is_found_by_its_token() -> None:
    assert language_token("fra_Latn", Languages(), "target_language") == 10  # type: ignore[arg-type]
    assert language_token("en", Languages(), "target_language") == 11  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="target_language") as refused:
        language_token("xx_Xxxx", Languages(), "target_language")  # type: ignore[arg-type]
    assert "xx_Xxxx" not in refused.value.message


@pytest.mark.parametrize(
    ("ids", "expected"), [((11, 5, 6, 2), (10, 5, 6, 2)), ((5, 6, 2, 11), (5, 6, 2, 10))], ids=["first", "last"]
)
def test_the_source_language_takes_the_defaults_place(ids: tuple[int, ...], expected: tuple[int, ...]) -> None:
    options = GenerationOptions(source_language="fra_Latn")
    special, plain = frozenset({2, 10, 11}), frozenset({2})
    assert in_language(ids, options, Languages(), special, plain) == expected  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        in_language((5, 6, 2), options, Languages(), special, plain)  # type: ignore[arg-type]

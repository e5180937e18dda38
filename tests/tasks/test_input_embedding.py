"""The size of a model's input embedding as its files tell it, against the model that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from serve_app.errors import IncompleteModelError
from serve_app.tasks.input_embedding import embedding_rows
from tests.model.tiny import tiny_model

FAMILIES = (
    *("albert", "bart", "bert", "bloom", "deberta-v2", "distilbert", "electra", "fnet", "gpt2", "gpt_neo", "gpt_neox"),
    *("llama", "mbart", "mobilebert", "modernbert", "mpnet", "nomic_bert", "opt", "qwen3", "roberta", "t5", "xlnet"),
)


def rewrite(folder: Path, **keys: Any) -> None:
    """Change keys of config.json; None takes one out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text("utf-8")), **keys}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "parts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_tell_it_where_the_config_does_not(family: str, shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model(family, vocab_size=101)
    model.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / "model.safetensors").is_file() == (shard_bytes == 10**9)
    rows = model.get_input_embeddings().weight.shape[0]
    rewrite(tmp_path, vocab_size=None)
    assert embedding_rows(tmp_path) == rows == 101


@pytest.mark.parametrize("family", [*FAMILIES, "flaubert", "xlm"])
def test_the_config_tells_it_where_there_are_no_such_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    assert embedding_rows(tmp_path) == model.get_input_embeddings().weight.shape[0]


def test_the_encoders_own_table_counts_and_not_the_decoders(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    tables = {"vocab_size": 40, "decoder_vocab_size": 90, "share_encoder_decoder_embeddings": False}
    special = {"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0}
    config = AutoConfig.for_model("marian", **sizes, **heads, **tables, **special, tie_word_embeddings=False)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert embedding_rows(tmp_path) == model.get_encoder().get_input_embeddings().weight.shape[0] == 40


def test_a_model_of_text_and_pictures_has_its_size_in_a_config_of_its_text_part(tmp_path: Path) -> None:
    text = {"vocab_size": 77, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert embedding_rows(tmp_path) == 77


def test_rows_that_a_family_adds_to_its_vocabulary_are_counted(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=50)
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, vocab_size=50)
    assert embedding_rows(tmp_path) == 64


@pytest.mark.parametrize("content", [None, '{"vocab_size": "many"}'])
def test_files_that_do_not_tell_it_are_no_error(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert embedding_rows(tmp_path) is None


@pytest.mark.parametrize("content", ["no JSON", "[]"])
def test_a_broken_file_is_told_as_by_whoever_else_reads_it(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(IncompleteModelError, match=r"config\.json"):
        embedding_rows(tmp_path)


def test_a_model_that_was_resized_knows_its_new_tokens(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    assert embedding_rows(tmp_path) == AutoModel.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == 120

from __future__ import annotations

import pytest

from serve_app.cache.selection import needed_files
from serve_app.errors import IncompleteModelError

MINILM = [
    ".gitattributes",
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.xml",
    "pytorch_model.bin",
    "rust_model.ot",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tf_model.h5",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_script.py",
    "training_args.bin",
    "vocab.txt",
]


def test_keeps_weights_configuration_and_tokenizer_only() -> None:
    assert needed_files(MINILM, "x/y") == [
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "spiece.model", "merges.txt", "qwen.tiktoken", "chat_template.jinja", "source.spm"]
)
def test_keeps_every_kind_of_tokenizer(name: str) -> None:
    assert name in needed_files(["config.json", "model.safetensors", name], "x/y")


def test_keeps_dense_modules_with_their_weights() -> None:
    files = ["config.json", "model.safetensors", "2_Dense/config.json", "2_Dense/model.safetensors"]
    assert needed_files(files, "x/y") == sorted(files)


def test_keeps_all_shards_and_their_index() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    files = ["config.json", *shards, "consolidated.safetensors"]
    assert needed_files(files, "x/y") == sorted(["config.json", *shards])


def test_takes_one_copy_of_the_weights_where_there_are_two() -> None:
    files = ["config.json", "model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert needed_files(files, "x/y") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "weights", [["pytorch_model.bin"], ["model.safetensors", "2_Dense/config.json", "2_Dense/pytorch_model.bin"]]
)
def test_refuses_pickled_weights_and_says_what_to_do(weights: list[str]) -> None:
    with pytest.raises(IncompleteModelError, match=r"pytorch_model\.bin.*safetensors"):
        needed_files(["config.json", *weights], "x/y")


def test_refuses_a_repository_without_weights() -> None:
    with pytest.raises(IncompleteModelError, match="x/y has no weights in safetensors"):
        needed_files(["config.json"], "x/y")


def test_refuses_what_is_no_model() -> None:
    with pytest.raises(IncompleteModelError, match=r"config\.json is not among"):
        needed_files(["data.safetensors"], "x/y")


@pytest.mark.parametrize(
    "files", [["adapter_config.json", "adapter_model.safetensors"], ["0_Transformer/adapter_config.json"]]
)
def test_refuses_an_adapter_beside_a_model_or_alone_and_says_what_to_do(files: list[str]) -> None:
    for base in ([], ["config.json", "model.safetensors"]):
        with pytest.raises(IncompleteModelError, match=r"an adapter \(adapter_config\.json\).*merge_and_unload"):
            needed_files([*base, *files], "x/y")


def test_takes_the_base_model_alone_where_patterns_leave_the_adapter_out() -> None:
    files = ["config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"]
    chosen = ["config.json", "model.safetensors"]
    assert needed_files(files, "x/y", chosen) == chosen


def test_patterns_take_the_place_of_the_usual_choice() -> None:
    patterns = ["*.json", "onnx/model.onnx", "model.safetensors"]
    assert needed_files(MINILM, "x/y", patterns) == sorted(
        path for path in MINILM if path.endswith(".json") or path in ("onnx/model.onnx", "model.safetensors")
    )


def test_pickles_that_patterns_name_are_refused_too() -> None:
    with pytest.raises(IncompleteModelError, match="allow_pickle"):
        needed_files(MINILM, "x/y", ["config.json", "pytorch_model.bin"])
    taken = needed_files(MINILM, "x/y", ["config.json", "pytorch_model.bin"], allow_pickle=True)
    assert taken == ["config.json", "pytorch_model.bin"]


def test_allowed_pickles_are_left_behind_where_there_is_safetensors() -> None:
    assert "pytorch_model.bin" not in needed_files(MINILM, "x/y", allow_pickle=True)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.model.loader import load, pick_device
from tests.model.tiny import load_tiny, tiny_model


def config(**keys: Any) -> ModelConfig:
    return ModelConfig(**{"name": "m", "source": "./m", "device": "cpu", "max_input_tokens": 32, **keys})


def edit_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_loaded_model_is_the_saved_one_in_eval_mode(tmp_path: Path) -> None:
    loaded = load_tiny("bert", tmp_path)
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(
        loaded.module(input_ids=ids).last_hidden_state, tiny_model("bert")(input_ids=ids).last_hidden_state
    )
    assert not loaded.module.training
    assert (loaded.model_type, loaded.hidden_size, loaded.pad_token_id, loaded.vocab_size) == ("bert", 32, 1, 97)
    assert (loaded.device.type, loaded.dtype, loaded.pooling) == ("cpu", torch.float32, "mean")


@pytest.mark.parametrize(("model_type", "expected"), [("bert", True), ("roberta", True), ("distilbert", False)])
def test_token_types_are_taken_where_the_model_takes_them(model_type: str, expected: bool, tmp_path: Path) -> None:
    assert load_tiny(model_type, tmp_path).takes_token_types is expected


def test_pooler_is_left_out(tmp_path: Path) -> None:
    assert load_tiny("bert", tmp_path).module.pooler is None


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian"])
def test_only_the_encoder_of_an_encoder_decoder_is_kept(model_type: str, tmp_path: Path) -> None:
    module = load_tiny(model_type, tmp_path).module
    assert not any("decoder" in name for name, _ in module.named_parameters())


def test_configured_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    assert load_tiny("bert", tmp_path, dtype="float16").module.dtype is torch.float16


def test_cuda_that_is_not_there_is_a_bad_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(config(device="auto")).type == "cpu"
    with pytest.raises(ConfigError, match=r"models\.m\.device"):
        pick_device(config(device="cuda"))


def test_missing_weight_is_an_incomplete_model_not_a_random_one(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(IncompleteModelError, match=r"lack 1 weights: encoder\.layer\.1\.output\.dense"):
        load(tmp_path, config(), 32)


def test_damaged_weights_are_an_incomplete_model(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IncompleteModelError, match="are damaged"):
        load(tmp_path, config(), 32)


def test_weights_of_other_shapes_are_a_bad_configuration(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path, config(), 32)


def test_positions_that_transformers_no_longer_knows_are_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, position_embedding_type="relative_key_query")
    with pytest.raises(ConfigError, match="relative_key_query is no longer in transformers"):
        load(tmp_path, config(), 32)


def test_pickled_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path, config(), 32)
    assert load(tmp_path, config(allow_pickle=True), 32).model_type == "bert"


def test_model_that_brings_its_own_code_is_refused_without_running_it(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    edit_config(tmp_path, model_type="homemade", auto_map=auto_map)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for ignored, told in ((False, "never run"), (True, "cannot be loaded")):
        with pytest.raises(ConfigError, match=told):
            load(tmp_path, config(ignore_auto_map=ignored), 32)
    assert not (tmp_path / "ran").exists()


def test_weights_in_the_folder_that_modules_json_names_are_loaded(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "0_Transformer")
    chain = {"Transformer": "0_Transformer", "Pooling": "1_Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for name, path in chain.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    assert load(tmp_path, config(), 32).model_type == "bert"


def task_config(task: str) -> ModelConfig:
    return config(task=task)


@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("text-classification", "classifier.bias, classifier.weight"),
        ("token-classification", "classifier.bias, classifier.weight"),
        ("question-answering", "qa_outputs.bias, qa_outputs.weight"),
    ],
)
def test_head_that_is_not_in_the_files_is_an_incomplete_model_not_a_random_one(
    task: str, missing: str, tmp_path: Path
) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[f"BertFor{ARCHITECTURE[task]}"])
    with pytest.raises(IncompleteModelError, match=f"lack 2 weights: {missing}; without them it cannot do {task}"):
        load(tmp_path, task_config(task), 32)


ARCHITECTURE = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
}


def test_task_that_transformers_has_no_model_of_the_family_for_is_a_bad_configuration(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"models\.m\.task"):
        load(tmp_path, task_config("fill-mask"), 32)

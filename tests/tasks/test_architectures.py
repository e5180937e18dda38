"""The task of a model from its own files, and what each class is for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.tasks.card import read_card
from serve_app.types import ModelCard

SENTENCE_MODULES = "sentence_transformers.models."


def card(folder: Path, task: Any = None, modules: tuple[str, ...] = (), **model: Any) -> ModelCard:
    keys = {"model_type": "bert", "hidden_size": 24, "max_position_embeddings": 64, **model}
    (folder / "config.json").write_text(json.dumps(keys))
    if modules:
        entries = [
            {"type": SENTENCE_MODULES + name, "path": f"{i}_{name}" if i else ""} for i, name in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(entries))
        for entry in entries[1:]:
            (folder / entry["path"]).mkdir(exist_ok=True)
            (folder / entry["path"] / "config.json").write_text("{}")
    return read_card(folder, ModelConfig(name="m", source="./somewhere", task=task), "")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "embedding"),
        ("BertForSequenceClassification", "text-classification"),
        ("RobertaForTokenClassification", "token-classification"),
        ("DistilBertForMaskedLM", "fill-mask"),
        ("FlaubertWithLMHeadModel", "fill-mask"),
        ("BertForQuestionAnswering", "question-answering"),
        ("XLMForQuestionAnsweringSimple", "question-answering"),
        ("GPT2LMHeadModel", "text-generation"),
        ("Qwen3ForCausalLM", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("PegasusForConditionalGeneration", "summarization"),
        ("MarianMTModel", "translation"),
        ("M2M100ForConditionalGeneration", "translation"),
    ],
)
def test_a_task_is_inferred_from_the_class_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str, task: str
) -> None:
    with caplog.at_level(logging.INFO, logger="serve_app"):
        assert card(tmp_path, architectures=[architecture]).task == task
    assert f"models.m.task: {task}" in caplog.text
    assert architecture in caplog.text


def test_a_model_without_architectures_is_for_embedding_or_what_is_configured(tmp_path: Path) -> None:
    assert card(tmp_path).task == "embedding"
    assert card(tmp_path, task="fill-mask").task == "fill-mask"


def test_one_label_is_a_reranker(tmp_path: Path) -> None:
    one = card(tmp_path, architectures=["BertForSequenceClassification"], id2label={"0": "LABEL_0"})
    assert (one.task, one.labels) == ("rerank", ("LABEL_0",))


def test_what_sentence_transformers_made_is_an_embedding_whatever_its_class(tmp_path: Path) -> None:
    modules = ("Transformer", "Pooling", "Normalize")
    assert card(tmp_path, modules=modules, architectures=["Qwen3ForCausalLM"]).task == "embedding"


def test_splade_is_a_sparse_embedding(tmp_path: Path) -> None:
    modules = ("MLMTransformer", "SpladePooling")
    assert card(tmp_path, modules=modules, architectures=["BertForMaskedLM"]).task == "sparse-embedding"
    (tmp_path / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "sum"}')
    with pytest.raises(ConfigError, match="sum and relu is not supported"):
        read_card(tmp_path, ModelConfig(name="m", source="./somewhere"), "")


@pytest.mark.parametrize(
    ("task", "architecture", "told"),
    [
        ("fill-mask", "BertForSequenceClassification", "text-classification"),
        ("text-generation", "T5ForConditionalGeneration", "text2text-generation"),
        ("translation", "GPT2LMHeadModel", "text-generation"),
        ("question-answering", "BertModel", "embedding"),
    ],
)
def test_a_task_that_the_model_has_no_head_for_is_refused(
    tmp_path: Path, task: str, architecture: str, told: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"models\.m\.task: {task} needs .* says {architecture}, which is for {told}"
    ):
        card(tmp_path, task=task, architectures=[architecture])


def test_a_reranker_with_several_labels_is_refused(tmp_path: Path) -> None:
    labels = {"0": "a", "1": "b", "2": "c"}
    with pytest.raises(ConfigError, match="one label, and this one has 3"):
        card(tmp_path, task="rerank", architectures=["BertForSequenceClassification"], id2label=labels)


def test_an_embedding_is_taken_from_any_class(tmp_path: Path) -> None:
    assert card(tmp_path, task="embedding", architectures=["BertForMaskedLM"]).task == "embedding"


def test_a_classifier_is_read_as_its_config_says(tmp_path: Path) -> None:
    labels = {str(i): name for i, name in enumerate("abcdefghijkl")}
    read = card(
        tmp_path,
        architectures=["BertForSequenceClassification"],
        id2label=labels,
        problem_type="multi_label_classification",
        function_to_apply="none",
    )
    assert read.labels == tuple("abcdefghijkl")
    assert (read.problem_type, read.default_function) == ("multi_label_classification", "none")


@pytest.mark.parametrize(("keys", "labels"), [({}, 2), ({"num_labels": 5}, 5)])
def test_labels_that_have_no_names_are_numbered_as_in_transformers(
    tmp_path: Path, keys: dict[str, Any], labels: int
) -> None:
    read = card(tmp_path, architectures=["BertForSequenceClassification"], **keys)
    assert read.labels == tuple(f"LABEL_{i}" for i in range(labels))


MULTIMODAL = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": {}}


@pytest.mark.parametrize("task", [None, "text-generation", "text2text-generation", "embedding"])
def test_a_multimodal_model_is_refused_as_such_whatever_it_is_to_be_served_for(tmp_path: Path, task: Any) -> None:
    with pytest.raises(ConfigError, match=r"Gemma3ForConditionalGeneration is a multimodal model .*vision_config"):
        card(tmp_path, task=task, **MULTIMODAL)


def test_a_broken_tokenizer_file_is_an_incomplete_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(IncompleteModelError, match=r"tokenizer\.json"):
        card(tmp_path)


def test_relative_positions_limit_only_where_nothing_else_does(tmp_path: Path) -> None:
    t5 = {"model_type": "t5", "d_model": 24, "n_positions": 512, "max_position_embeddings": None}
    assert card(tmp_path, **t5).max_input_tokens == 512
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 900}')
    assert card(tmp_path, **t5).max_input_tokens == 900

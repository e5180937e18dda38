"""What a model's own files say about it, read as JSON only: no torch, no transformers.

The files are those of sentence-transformers (`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`,
`config_sentence_transformers.json`) and of transformers (`config.json`, `tokenizer_config.json`). A model without
`modules.json` is a bare transformer: mean pooling, not normalised. What is configured wins over the files. Where no
task is configured, it is `embedding` for what sentence-transformers made, else what `architectures` are for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias, cast

from serve_app.config import GENERATING_TASKS, ModelConfig, TaskName
from serve_app.errors import ConfigError
from serve_app.tasks.architectures import architectures_of, check_reads_text, check_task, labels_of, task_of
from serve_app.tasks.json_files import Json, read_object
from serve_app.tasks.sentence_files import (
    Chain,
    activation_of,
    check_chain,
    options_of,
    read_chain,
    task_of_chain,
    transformer_folder,
)
from serve_app.types import GenerationDefaults, ModelCard, Side

__all__ = ["has_chat_template", "read_card", "transformer_folder"]

logger = logging.getLogger(__name__)

Pooling: TypeAlias = Literal["mean", "cls", "lasttoken"]

_POOLINGS = ("mean", "cls", "lasttoken")
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Families whose first position is `pad_token_id + 1`, so that so many rows of the position table are never used."""

_RELATIVE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})
"""Families whose positions are relative, so that `n_positions` is what they were trained on and no table's size."""

_POOLED_TASKS = ("embedding",)
_CLASSIFYING_TASKS = ("text-classification", "rerank", "zero-shot-classification", "token-classification")

_OF_SEQUENCES = ("text-classification", "rerank", "zero-shot-classification")

ADAPTER = (
    "adapter_config.json is among its files: an adapter changes the model, and is not applied. Merge it "
    "(merge_and_unload) and save the whole model, or leave adapter_config.json out if the model without it is meant"
)

_NO_LIMIT = 1_000_000
"""Tokenizers without a limit write `model_max_length` as 1e30."""


def read_card(path: Path, config: ModelConfig, revision: str) -> ModelCard:
    """Read the model files under `path`, but for what only transformers' tokenizer knows (`stock_tokenizer`).

    Raises IncompleteModelError where `config.json` is missing or a file is no JSON object, and ConfigError where the
    model needs what is not supported (a Dense module, another pooling, an adapter, code of its own), has no head for
    its task, or its longest input is not known.
    """
    where = f"models.{config.name}"
    chain = read_chain(path)
    folder = transformer_folder(path)
    model = read_object(folder / "config.json", required=True)
    _check_whole({path, folder}, where)
    check_reads_text(where, model)
    read_object(folder / "tokenizer.json")  # a broken one is told here, before transformers is loaded
    if not config.ignore_auto_map:
        _check_own_code(folder, model, where)
    prompts, default_prompt_name = _prompts(path, config)
    max_input_tokens = _max_input_tokens(folder, model, config)
    task = _task(path, chain, model, config)
    labels = labels_of(model) if task in _CLASSIFYING_TASKS else ()
    scores = task in _OF_SEQUENCES and len(labels) == 1
    return ModelCard(
        name=config.name,
        source=config.source,
        revision=revision,
        task=task,
        model_type=str(model.get("model_type", "")),
        max_input_tokens=max_input_tokens,
        hidden_size=_hidden_size(model, config),
        pooling=config.pooling or (_pooling(path, chain, prompts, config) if task in _POOLED_TASKS else "mean"),
        normalize="Normalize" in chain.classes if config.normalize is None else config.normalize,
        long_texts=config.long_texts or ("error" if task == "text-generation" else "truncate"),
        truncation_side=config.truncation_side or _truncation_side(folder),
        stride=max_input_tokens // 8 if config.stride is None else config.stride,
        labels=labels,
        problem_type=model.get("problem_type"),
        default_function=model.get("function_to_apply"),
        activation=activation_of(path, chain, model, where) if scores else "sigmoid",
        can_chat=has_chat_template(folder),
        task_prefixes=_task_prefixes(model),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        tokenizer_threads=config.tokenizer_threads,
        generation=_generation_defaults(folder, model) if task in GENERATING_TASKS else GenerationDefaults(),
    )


def _check_whole(folders: Iterable[Path], where: str) -> None:
    """Raises ConfigError where the weights are a part of the model only."""
    if any((folder / "adapter_config.json").exists() for folder in folders):
        raise ConfigError(f"{where}: {ADAPTER}")


def _check_own_code(folder: Path, model: Json, where: str) -> None:
    """Raises ConfigError where model or tokenizer are to be computed by code of the repository.

    Where transformers has a class for the same `model_type` it would take that one without a word.
    """
    for name, told in (
        ("config.json", model),
        ("tokenizer_config.json", read_object(folder / "tokenizer_config.json")),
    ):
        if told.get("auto_map"):
            raise ConfigError(
                f"{where}: {name} names code of the repository (auto_map), which is never run. Take a model that needs "
                "none, or set ignore_auto_map: true if transformers' own classes are known to give the same answers"
            )


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer comes with a template for conversations."""
    template = read_object(folder / "tokenizer_config.json").get("chat_template")
    return (folder / "chat_template.jinja").is_file() or bool(template)


def _generation_defaults(folder: Path, model: Json) -> GenerationDefaults:
    """Of `generation_config.json`, else of config.json, where older models have them."""
    file = folder / "generation_config.json"
    told = read_object(file) if file.exists() else model
    found = {name: told.get(name) for name in ("max_new_tokens", "max_length", "num_beams")}
    numbers = {name: value for name, value in found.items() if type(value) is int and value > 0}
    return GenerationDefaults(**numbers)


def _task_prefixes(model: Json) -> Mapping[str, str]:
    """`prefix` of each task in `task_specific_params`, which transformers' pipelines put before texts."""
    tasks = model.get("task_specific_params")
    if not isinstance(tasks, dict):
        return {}
    return {str(task): str(own["prefix"]) for task, own in tasks.items() if isinstance(own, dict) and own.get("prefix")}


def _task(path: Path, chain: Chain, model: Json, config: ModelConfig) -> TaskName:
    labels = len(labels_of(model))
    if config.task is not None:
        check_task(config, config.task, model)
        task: TaskName = config.task
    elif chain.modules:
        task = task_of_chain(chain, labels)
        logger.info("models.%s.task: %s, as a %s of sentence-transformers", config.name, task, chain.saved_by)
    else:
        task = task_of(architectures_of(model), labels)
        named = ", ".join(architectures_of(model)) or "no architecture"
        logger.info("models.%s.task: %s, because config.json names %s", config.name, task, named)
    if task in GENERATING_TASKS and config.long_texts == "windows":
        raise ConfigError(f"models.{config.name}.long_texts: windows is not for {task}, which reads a text at once")
    if chain.modules:
        _check_modules(path, chain, task, config)
    if task == "rerank" and labels != 1:
        raise ConfigError(f"models.{config.name}.task: rerank needs a model with one label, and this one has {labels}")
    return task


def _check_modules(path: Path, chain: Chain, task: TaskName, config: ModelConfig) -> None:
    """Raises ConfigError where the modules do not make what the task answers with."""
    where = f"models.{config.name}"
    meant = task_of_chain(chain, 1 if task == "rerank" else 2)
    if task in (meant, *(_OF_SEQUENCES if meant in _OF_SEQUENCES else ())):
        check_chain(path, chain, where)
    elif task in _POOLED_TASKS and config.pooling is None:
        raise ConfigError(
            f"{where}.task: {task} needs a Pooling module, and the model is a {chain.saved_by} of "
            f"sentence-transformers, which is for {meant}; leave the task out, or set pooling too if the vectors of "
            "its tokens are meant"
        )
    if task == "sparse-embedding" and "SpladePooling" in chain.classes:
        _check_splade(path / (chain.folder_of("SpladePooling") or ""), where)


def _check_splade(folder: Path, where: str) -> None:
    pooling = read_object(folder / "config.json")
    asked = (pooling.get("pooling_strategy", "max"), pooling.get("activation_function", "relu"))
    if asked != ("max", "relu"):
        raise ConfigError(
            f"{where}: SpladePooling with {' and '.join(map(str, asked))} is not supported; only the max "
            "over tokens of log(1 + relu(logits)) is"
        )


def _hidden_size(model: Json, config: ModelConfig) -> int:
    for key in ("hidden_size", "dim", "d_model", "n_embd"):
        if isinstance(model.get(key), int):
            return int(model[key])
    raise ConfigError(f"models.{config.name}: config.json has no hidden_size, dim, d_model or n_embd")


def _pooling(path: Path, chain: Chain, prompts: Mapping[str, str], config: ModelConfig) -> Pooling:
    folder = chain.folder_of("Pooling")
    pooling = read_object(path / (folder or "1_Pooling") / "config.json", required=folder is not None)
    modes = pooling.get("pooling_mode") or [name for flag, name in _POOLING_FLAGS.items() if pooling.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ConfigError(
            f"models.{config.name}.pooling: the model's files ask for {' + '.join(modes)}, which is not supported; "
            f"set it to one of {', '.join(_POOLINGS)} only if the model was trained for it"
        )
    if pooling.get("include_prompt") is False and any(prompts.values()):
        raise ConfigError(
            f"models.{config.name}: the model leaves prompts out of its pooling (include_prompt: false), "
            "which is not supported; set prompts to {} and write them into the texts only if that is meant"
        )
    return cast(Pooling, modes[0])


def _prompts(path: Path, config: ModelConfig) -> tuple[Mapping[str, str], str | None]:
    stored = read_object(path / "config_sentence_transformers.json")
    prompts = config.prompts
    if prompts is None:
        prompts = {str(name): str(text or "") for name, text in (stored.get("prompts") or {}).items()}
    named = config.default_prompt_name
    if named is None and config.prompts is None:
        named = stored.get("default_prompt_name")
    if named is not None and named not in prompts:
        raise ConfigError(
            f"models.{config.name}.default_prompt_name: {named!r} is not among the prompts {sorted(prompts)}"
        )
    return prompts, named


def _max_input_tokens(folder: Path, model: Json, config: ModelConfig) -> int:
    """Configured, else `max_seq_length`, else the tokenizer's limit; never above the position embeddings."""
    positions = _positions(model)
    limits = (config.max_input_tokens, _max_seq_length(folder), _tokenizer_limit(folder), positions)
    wanted = next((limit for limit in (*limits, model.get("n_positions")) if limit), None)
    if wanted is None:
        raise ConfigError(
            f"models.{config.name}.max_input_tokens: the model's files name no limit; set the longest input in tokens"
        )
    if positions is not None and config.max_input_tokens and config.max_input_tokens > positions:
        raise ConfigError(
            f"models.{config.name}.max_input_tokens: {config.max_input_tokens} is above the model's "
            f"{positions} positions"
        )
    return min(wanted, positions or wanted)


def _positions(model: Json) -> int | None:
    """Tokens that the position table holds, or None where positions are relative and unlimited."""
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(model.get(key), int) and model[key] > 0 and model.get("model_type") not in _RELATIVE:
            offset = model.get("pad_token_id", 1) + 1 if model.get("model_type") in _OFFSET_POSITIONS else 0
            return int(model[key]) - int(offset)
    return None


def _max_seq_length(folder: Path) -> int | None:
    value = options_of(folder).get("max_seq_length")
    return value if isinstance(value, int) and value > 0 else None


def _truncation_side(folder: Path) -> Side | None:
    side = read_object(folder / "tokenizer_config.json").get("truncation_side")
    return side if side in ("left", "right") else None


def _tokenizer_limit(folder: Path) -> int | None:
    value = read_object(folder / "tokenizer_config.json").get("model_max_length")
    return int(value) if isinstance(value, int | float) and 0 < value < _NO_LIMIT else None

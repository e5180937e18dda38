"""What a model's own files say about it, read as JSON only: no torch, no transformers.

The files are those of sentence-transformers (`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`,
`config_sentence_transformers.json`) and of transformers (`config.json`, `tokenizer_config.json`). A model without
`modules.json` is a bare transformer: mean pooling, not normalised. What is configured wins over the files. Where no
task is configured, it is `embedding` for what sentence-transformers made, else what `architectures` are for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from serve_app.config import GENERATING_TASKS, ModelConfig, TaskName
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.paths import check_relative
from serve_app.tasks.architectures import architectures_of, check_task, labels_of, task_of
from serve_app.tasks.special_tokens import SpecialTokens, has_chat_template
from serve_app.types import GenerationDefaults, ModelCard, Side

logger = logging.getLogger(__name__)

Pooling: TypeAlias = Literal["mean", "cls", "lasttoken"]
Json: TypeAlias = Mapping[str, Any]

_POOLINGS = ("mean", "cls", "lasttoken")
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
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

_MODULES = frozenset({"Transformer", "MLMTransformer", "Pooling", "Normalize", "SpladePooling"})

_NO_LIMIT = 1_000_000
"""Tokenizers without a limit write `model_max_length` as 1e30."""


def read_card(path: Path, config: ModelConfig, revision: str) -> ModelCard:
    """Read the model files under `path`.

    Raises IncompleteModelError where `config.json` is missing or a file is no JSON object, and ConfigError where the
    model needs what is not supported (a Dense module, another pooling), has no head for its task, or its longest input
    is not known.
    """
    modules = _modules(path)
    folder = transformer_folder(path)
    model = _json(folder / "config.json", required=True)
    prompts, default_prompt_name = _prompts(path, config)
    max_input_tokens = _max_input_tokens(folder, model, config)
    task = _task(path, modules, model, config)
    special = SpecialTokens(folder)
    return ModelCard(
        name=config.name,
        source=config.source,
        revision=revision,
        task=task,
        model_type=str(model.get("model_type", "")),
        max_input_tokens=max_input_tokens,
        hidden_size=_hidden_size(model, config),
        pooling=config.pooling or (_pooling(path, modules, prompts, config) if task in _POOLED_TASKS else "mean"),
        normalize="Normalize" in modules if config.normalize is None else config.normalize,
        long_texts=config.long_texts or ("error" if task == "text-generation" else "truncate"),
        truncation_side=config.truncation_side or _truncation_side(folder),
        stride=max_input_tokens // 8 if config.stride is None else config.stride,
        labels=labels_of(model) if task in _CLASSIFYING_TASKS else (),
        problem_type=model.get("problem_type"),
        default_function=model.get("function_to_apply"),
        mask_token_id=special.id_of("mask_token"),
        cls_token_id=special.id_of("cls_token"),
        can_chat=has_chat_template(folder),
        turn_end_ids=tuple(i for i in map(special.id_of, ("eos_token", "eot_token")) if i is not None),
        task_prefixes=_task_prefixes(model),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        tokenizer_threads=config.tokenizer_threads,
        generation=_generation_defaults(folder, model) if task in GENERATING_TASKS else GenerationDefaults(),
    )


def _generation_defaults(folder: Path, model: Json) -> GenerationDefaults:
    """Of `generation_config.json`, else of config.json, where older models have them."""
    file = folder / "generation_config.json"
    told = _json(file) if file.exists() else model
    found = {name: told.get(name) for name in ("max_new_tokens", "max_length", "num_beams")}
    numbers = {name: value for name, value in found.items() if type(value) is int and value > 0}
    return GenerationDefaults(**numbers)


def _task_prefixes(model: Json) -> Mapping[str, str]:
    """`prefix` of each task in `task_specific_params`, which transformers' pipelines put before texts."""
    tasks = model.get("task_specific_params")
    if not isinstance(tasks, dict):
        return {}
    return {str(task): str(own["prefix"]) for task, own in tasks.items() if isinstance(own, dict) and own.get("prefix")}


def transformer_folder(path: Path) -> Path:
    """The folder of the weights, `config.json` and the tokenizer: `path`, or the one `modules.json` names below it."""
    modules = _modules(path)
    return path / (modules.get("Transformer") or modules.get("MLMTransformer") or "")


def _task(path: Path, modules: Mapping[str, str], model: Json, config: ModelConfig) -> TaskName:
    if config.task is not None:
        check_task(config, config.task, model)
        task: TaskName = config.task
    elif modules:
        task = "sparse-embedding" if "SpladePooling" in modules else "embedding"
        logger.info("models.%s.task: %s, as modules.json says", config.name, task)
    else:
        task = task_of(architectures_of(model), len(labels_of(model)))
        named = ", ".join(architectures_of(model)) or "no architecture"
        logger.info("models.%s.task: %s, because config.json names %s", config.name, task, named)
    if task in GENERATING_TASKS and config.long_texts == "windows":
        raise ConfigError(f"models.{config.name}.long_texts: windows is not for {task}, which reads a text at once")
    if task == "sparse-embedding":
        _check_splade(path, modules, config)
    if task == "rerank" and len(labels_of(model)) != 1:
        raise ConfigError(
            f"models.{config.name}.task: rerank needs a model with one label, and this one has {len(labels_of(model))}"
        )
    return task


def _check_splade(path: Path, modules: Mapping[str, str], config: ModelConfig) -> None:
    pooling = _json(path / modules["SpladePooling"] / "config.json") if "SpladePooling" in modules else {}
    asked = (pooling.get("pooling_strategy", "max"), pooling.get("activation_function", "relu"))
    if asked != ("max", "relu"):
        raise ConfigError(
            f"models.{config.name}: SpladePooling with {' and '.join(map(str, asked))} is not supported; only the max "
            "over tokens of log(1 + relu(logits)) is"
        )


def _modules(path: Path) -> dict[str, str]:
    """Class name → folder of each module in `modules.json`; empty where there is none."""
    file = path / "modules.json"
    if not file.exists():
        return {}
    modules = {str(entry["type"]).rsplit(".", 1)[-1]: str(entry["path"]) for entry in _parse(file, list)}
    for folder in filter(None, modules.values()):  # empty: the model's own
        check_relative(folder)
    unknown = sorted(set(modules) - _MODULES)
    if unknown:
        raise ConfigError(
            f"{path.name}: modules.json has the module {', '.join(unknown)}, which is not supported: only Transformer, "
            "Pooling (mean, cls, lasttoken), Normalize, MLMTransformer and SpladePooling are. Without it the "
            "embeddings would be other ones."
        )
    return modules


def _hidden_size(model: Json, config: ModelConfig) -> int:
    for key in ("hidden_size", "dim", "d_model", "n_embd"):
        if isinstance(model.get(key), int):
            return int(model[key])
    raise ConfigError(f"models.{config.name}: config.json has no hidden_size, dim, d_model or n_embd")


def _pooling(path: Path, modules: Mapping[str, str], prompts: Mapping[str, str], config: ModelConfig) -> Pooling:
    pooling = _json(path / modules.get("Pooling", "1_Pooling") / "config.json", required="Pooling" in modules)
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
    stored = _json(path / "config_sentence_transformers.json")
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
    for name in _SENTENCE_CONFIGS:
        value = _json(folder / name).get("max_seq_length")
        if isinstance(value, int) and value > 0:
            return value
    return None


def _truncation_side(folder: Path) -> Side | None:
    side = _json(folder / "tokenizer_config.json").get("truncation_side")
    return side if side in ("left", "right") else None


def _tokenizer_limit(folder: Path) -> int | None:
    value = _json(folder / "tokenizer_config.json").get("model_max_length")
    return int(value) if isinstance(value, int | float) and 0 < value < _NO_LIMIT else None


def _json(file: Path, required: bool = False) -> Json:
    if not file.exists():
        if required:
            raise IncompleteModelError(f"{file.parent.name}/{file.name} is missing from the model's files")
        return {}
    return cast(Json, _parse(file, dict))


def _parse(file: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IncompleteModelError(f"{file.parent.name}/{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise IncompleteModelError(f"{file.parent.name}/{file.name} is not a JSON {kind.__name__}")
    return value

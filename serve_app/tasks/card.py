"""What a model's own files say about it, read as JSON only: no torch, no transformers.

The files are those of sentence-transformers (`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`,
`config_sentence_transformers.json`) and of transformers (`config.json`, `tokenizer_config.json`). A model without
`modules.json` is a bare transformer: mean pooling, not normalised. What is configured wins over the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.types import ModelCard

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

_NO_LIMIT = 1_000_000
"""Tokenizers without a limit write `model_max_length` as 1e30."""


def read_card(path: Path, config: ModelConfig, revision: str) -> ModelCard:
    """Read the model files under `path`.

    Raises IncompleteModelError where `config.json` is missing or a file is no JSON object, and ConfigError where the
    model needs what is not supported (a Dense module, another pooling) or its longest input is not known.
    """
    modules = _modules(path)
    folder = transformer_folder(path)
    model = _json(folder / "config.json", required=True)
    prompts, default_prompt_name = _prompts(path, config)
    max_input_tokens = _max_input_tokens(folder, model, config)
    return ModelCard(
        name=config.name,
        source=config.source,
        revision=revision,
        task=config.task or "embedding",
        model_type=str(model.get("model_type", "")),
        max_input_tokens=max_input_tokens,
        hidden_size=_hidden_size(model, config),
        pooling=config.pooling or _pooling(path, modules, prompts, config),
        normalize="Normalize" in modules if config.normalize is None else config.normalize,
        long_texts=config.long_texts,
        stride=max_input_tokens // 8 if config.stride is None else config.stride,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
    )


def transformer_folder(path: Path) -> Path:
    """The folder of the weights, `config.json` and the tokenizer: `path`, or the one `modules.json` names below it."""
    return path / _modules(path).get("Transformer", "")


def _modules(path: Path) -> dict[str, str]:
    """Class name → folder of each module in `modules.json`; empty where there is none."""
    file = path / "modules.json"
    if not file.exists():
        return {}
    modules = {str(entry["type"]).rsplit(".", 1)[-1]: str(entry["path"]) for entry in _parse(file, list)}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ConfigError(
            f"{path.name}: modules.json has the module {', '.join(unknown)}, which is not supported: only Transformer, "
            "Pooling (mean, cls, lasttoken) and Normalize are. Without it the embeddings would be other ones."
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
    wanted = config.max_input_tokens or _max_seq_length(folder) or _tokenizer_limit(folder) or positions
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
        if isinstance(model.get(key), int) and model[key] > 0 and model.get("model_type") != "t5":
            offset = model.get("pad_token_id", 1) + 1 if model.get("model_type") in _OFFSET_POSITIONS else 0
            return int(model[key]) - int(offset)
    return None


def _max_seq_length(folder: Path) -> int | None:
    for name in _SENTENCE_CONFIGS:
        value = _json(folder / name).get("max_seq_length")
        if isinstance(value, int) and value > 0:
            return value
    return None


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

"""Loads a model's weights from local files: offline, safetensors unless configured otherwise, no code of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.model.bucketing import LAST_TOKEN
from serve_app.model.precision import Precision, pick_precision
from serve_app.tasks.card import read_card, transformer_folder
from serve_app.tasks.stock_tokenizer import load_stock_tokenizer

_CLASSES: Mapping[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "rerank": AutoModelForSequenceClassification,
    "zero-shot-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "fill-mask": AutoModelForMaskedLM,
    "sparse-embedding": AutoModelForMaskedLM,
}
"""Of tasks whose head is part of the model. Embedding has none: it takes the encoder alone."""

SEQUENCE_TASKS = frozenset({"text-classification", "rerank", "zero-shot-classification"})
"""Tasks whose head makes one row of a whole sequence."""

NO_PADDING_TOKEN = -1
"""Stands for the padding token of classifiers that have none, which would refuse batches without one."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device.

    `module` makes hidden states. `model` is the whole of which it is the base, with the head of its task; None for
    embedding, where `module` has neither pooler nor decoder.
    """

    module: Any
    device: torch.device
    precision: Precision
    model_type: str
    hidden_size: int
    max_input_tokens: int
    pooling: Literal["mean", "cls", "lasttoken"]
    pad_token_id: int
    takes_token_types: bool
    vocab_size: int
    num_threads: int
    task: str = "embedding"
    model: Any = None
    mask_token_id: int | None = None
    decoder_start: int | None = None
    """First token of the decoder (or LAST_TOKEN), where `module` has one."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.precision.weights


def load(path: Path, config: ModelConfig, max_input_tokens: int) -> LoadedModel:
    """Load the model whose files lie in `path`; nothing is requested from any network.

    Raises ConfigError where the device, the family or the files' format is not supported, and IncompleteModelError
    where weights are missing.
    """
    card = read_card(path, config, config.revision or "")
    device = pick_device(config)
    precision = pick_precision(config, device)
    model = _read_weights(transformer_folder(path), config, card.task, precision.weights)
    put_on(device, model, config)
    module = model if card.task == "embedding" else model.base_model
    mask_token_id = load_stock_tokenizer(path).mask_token_id if card.task == "fill-mask" else None
    if card.task == "fill-mask" and not _is_known(mask_token_id, module):
        raise ConfigError(f"models.{config.name}.task: fill-mask needs a mask token that tokenizer and model both have")
    return LoadedModel(
        module=module,
        device=device,
        precision=precision,
        model_type=card.model_type,
        hidden_size=card.hidden_size,
        max_input_tokens=max_input_tokens,
        pooling=card.pooling,
        pad_token_id=_padding(module),
        takes_token_types="token_type_ids" in inspect.signature(module.forward).parameters,
        vocab_size=int(module.config.vocab_size),
        num_threads=config.num_threads,
        task=card.task,
        model=None if card.task == "embedding" else model,
        mask_token_id=mask_token_id,
        decoder_start=_decoder_start(module),
    )


def known_ids(module: Any) -> int | None:
    """How many token ids the input embedding of a model has; None where its family looks ids up in another way."""
    try:
        reader = module.get_encoder() if module.config.is_encoder_decoder else module
        table = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # by which transformers tells that a family has no such table
        return None
    return int(table.weight.shape[0]) if isinstance(table, torch.nn.Embedding) else None


def _padding(module: Any) -> int:
    """What fills the places of no text: the padding token, or 0 where it is none of the model's own.

    One that was added to the tokenizer alone has no row in the model's table. Attention leaves these places out.
    """
    token = getattr(module.config, "pad_token_id", None)
    return token if _is_known(token, module) else 0


def _is_known(token: int | None, module: Any) -> TypeGuard[int]:
    known = known_ids(module)
    return token is not None and token >= 0 and (known is None or token < known)


def _decoder_start(module: Any) -> int | None:
    """What the stock model puts first where it reads a text with its decoder; None without a decoder."""
    if not (module.config.is_encoder_decoder and hasattr(module, "decoder")):
        return None
    return LAST_TOKEN if module.config.model_type == "mbart" else int(module.config.decoder_start_token_id)


def pick_device(config: ModelConfig) -> torch.device:
    """The configured device; `auto` is the first visible GPU, else the CPU. Raises ConfigError if it is not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(f"models.{config.name}.device: cuda is configured, but torch sees no CUDA device here")
    on_cuda = available and config.device != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def put_on(device: torch.device, model: Any, config: ModelConfig) -> None:
    """Move the weights, for inference. Raises ConfigError where the device's free memory does not carry them."""
    try:
        model.to(device).eval()
    except torch.OutOfMemoryError as error:
        gib = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / (1 << 30)
        raise ConfigError(
            f"models.{config.name}: the weights ({gib:.2f} GiB) do not fit the device's free memory; use a smaller "
            "dtype, raise memory_fraction, or use a larger device"
        ) from error


def _read_weights(folder: Path, config: ModelConfig, task: str, dtype: torch.dtype) -> Any:
    transformers_logging.disable_progress_bar()
    safetensors = None if config.allow_pickle else True  # None takes them where they are, else pickled weights
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        family = AutoConfig.from_pretrained(folder, **options)
        _refuse_relative_keys(family, config)
        module, report = _class(task, family, config).from_pretrained(
            folder, config=family, dtype=dtype, use_safetensors=safetensors, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise IncompleteModelError(f"the weights in {folder.name} are damaged: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"models.{config.name}: the model cannot be loaded: {error}") from error
    missing = set(report["missing_keys"])
    return _encoder(module, missing) if task == "embedding" else _with_head(module, missing, task)


def _class(task: str, family: Any, config: ModelConfig) -> Any:
    """The class of transformers that computes the task. Raises ConfigError where there is none for the family."""
    if task == "embedding":
        return AutoModelForTextEncoding if type(family) in AutoModelForTextEncoding._model_mapping else AutoModel
    if task not in _CLASSES or type(family) not in _CLASSES[task]._model_mapping:
        raise ConfigError(f"models.{config.name}.task: transformers has no {family.model_type} model for {task}")
    return _CLASSES[task]


def _refuse_relative_keys(family: Any, config: ModelConfig) -> None:
    """Transformers 5 dropped these from BERT and its kin, and loads such weights as if positions were absolute."""
    positions = str(getattr(family, "position_embedding_type", None))
    if positions.startswith("relative_key"):
        raise ConfigError(f"models.{config.name}: position_embedding_type {positions} is no longer in transformers")


def _encoder(module: Any, missing_keys: set[str]) -> Any:
    """The part of the model that embeds: no decoder, no pooler. Raises IncompleteModelError if it lacks weights."""
    prefix = ""
    if getattr(module.config, "is_encoder_decoder", False) and hasattr(module, "decoder"):
        module, prefix = module.get_encoder(), "encoder."
    _refuse_missing({key for key in missing_keys if key.startswith(prefix) and not key.startswith("pooler.")}, "")
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    return _without_cache(module)


def _with_head(model: Any, missing_keys: set[str], task: str) -> Any:
    """The whole model. Raises IncompleteModelError if it lacks weights: transformers would make them up."""
    _refuse_missing(missing_keys, f"; without them it cannot do {task}")
    if task in SEQUENCE_TASKS and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = NO_PADDING_TOKEN
    return _without_cache(model)


def _refuse_missing(missing_keys: set[str], consequence: str) -> None:
    if missing_keys:
        names = ", ".join(sorted(missing_keys)[:5]) + (", ..." if len(missing_keys) > 5 else "")
        raise IncompleteModelError(f"the model's files lack {len(missing_keys)} weights: {names}{consequence}")


def _without_cache(model: Any) -> Any:
    """Nothing is generated: keys and values are never wanted again."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.use_cache = False
    return model

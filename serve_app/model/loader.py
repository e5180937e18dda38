"""Loads a model's weights from local files: offline, safetensors unless configured otherwise, no code of its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.utils import logging as transformers_logging

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.model.precision import Precision, pick_precision
from serve_app.tasks.card import read_card, transformer_folder


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device; `module` is the transformers model without pooler and decoder."""

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
    module = _read_weights(transformer_folder(path), config, precision.weights).to(device).eval()
    return LoadedModel(
        module=module,
        device=device,
        precision=precision,
        model_type=card.model_type,
        hidden_size=card.hidden_size,
        max_input_tokens=max_input_tokens,
        pooling=card.pooling,
        pad_token_id=getattr(module.config, "pad_token_id", None) or 0,
        takes_token_types="token_type_ids" in inspect.signature(module.forward).parameters,
        vocab_size=int(module.config.vocab_size),
        num_threads=config.num_threads,
    )


def pick_device(config: ModelConfig) -> torch.device:
    """The configured device; `auto` is the first visible GPU, else the CPU. Raises ConfigError if it is not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(f"models.{config.name}.device: cuda is configured, but torch sees no CUDA device here")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def _read_weights(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    transformers_logging.disable_progress_bar()
    safetensors = None if config.allow_pickle else True  # None takes them where they are, else pickled weights
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        family = AutoConfig.from_pretrained(folder, **options)
        _refuse_relative_keys(family, config)
        cls = AutoModelForTextEncoding if type(family) in AutoModelForTextEncoding._model_mapping else AutoModel
        module, report = cls.from_pretrained(
            folder, config=family, dtype=dtype, use_safetensors=safetensors, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise IncompleteModelError(f"the weights in {folder.name} are damaged: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"models.{config.name}: the model cannot be loaded: {error}") from error
    return _encoder(module, report["missing_keys"])


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
    missing = sorted(key for key in missing_keys if key.startswith(prefix) and not key.startswith("pooler."))
    if missing:
        raise IncompleteModelError(f"the model's files lack {len(missing)} weights, among them {missing[0]}")
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    module.config.use_cache = False  # nothing is generated: keys and values are never wanted again
    return module

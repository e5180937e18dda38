"""Loads a model that generates, with its tokenizer for the way back to text, and finds out how it can be run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, IncompleteModelError
from serve_app.model.generation.decoding import Decoding, differs_in_a_batch
from serve_app.model.host import available_memory_bytes
from serve_app.model.loader import pick_device, put_on
from serve_app.model.memory import read_cuda
from serve_app.model.precision import Precision, pick_precision
from serve_app.tasks.card import read_card, transformer_folder

logger = logging.getLogger(__name__)

_CLASSES: Mapping[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "text2text-generation": AutoModelForSeq2SeqLM,
    "summarization": AutoModelForSeq2SeqLM,
    "translation": AutoModelForSeq2SeqLM,
}

CPU_SHARE, CUDA_SHARE = 0.25, 0.6
"""Of the memory that is free after loading, for keys and values; the rest is for prefills, beams and copies."""


class SlowDecoder:
    """A tokenizer of transformers without a fast form, seen as a fast one; threads take turns."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = len(tokenizer)
        self._turn = threading.Lock()
        self.special = frozenset(int(i) for i in tokenizer.all_special_ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        with self._turn:
            known = [i for i in ids if i < self._size]  # a model may have more ids, which fast ones leave out too
            text: str = self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, id: int) -> str | None:
        token: str | None = self._tokenizer.convert_ids_to_tokens(id) if id < self._size else None
        return token

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found


@dataclass(frozen=True, slots=True)
class LoadedGenerator:
    """`window` is how many positions the decoder has, None for no end; `mode` is "by steps", or why it is not so."""

    model: Any
    device: torch.device
    precision: Precision
    decoder: Tokenizer | SlowDecoder
    special: frozenset[int]
    window: int | None
    max_input_tokens: int
    bytes_per_token: int
    mode: str

    @property
    def by_steps(self) -> bool:
        return self.mode == "by steps"


def load(path: Path, config: ModelConfig) -> LoadedGenerator:
    """Load from local files; nothing is requested from any network.

    Raises ConfigError where task, device, family or dtype is not supported, IncompleteModelError where files lack.
    """
    transformers_logging.set_verbosity_error()  # it warns of flags at every request
    card = read_card(path, config, config.revision or "")
    device = pick_device(config)
    precision = pick_precision(config, device)
    if precision.int8:
        raise ConfigError(f"models.{config.name}.dtype: int8 is not for tasks that generate")
    folder = transformer_folder(path)
    model = _weights(folder, config, _class(card.task, config), precision.weights)
    put_on(device, model, config)
    with precision.computing(device):
        mode = _mode(model, device, precision)
        bytes_per_token = Decoding(model, device).bytes_per_token() if mode == "by steps" else _most_bytes(model)
    if mode != "by steps":
        logger.warning("models.%s: answers are generated each by itself, not in a batch: %s", config.name, mode)
    decoder = load_decoder(folder)
    return LoadedGenerator(
        model=model,
        device=device,
        precision=precision,
        decoder=decoder,
        special=special_tokens(decoder),
        window=_window(model, card.max_input_tokens),
        max_input_tokens=card.max_input_tokens,
        bytes_per_token=bytes_per_token,
        mode=mode,
    )


def _class(task: str, config: ModelConfig) -> Any:
    found = _CLASSES.get(task)
    if found is None:
        raise ConfigError(f"models.{config.name}.task: {task} is no task that generates")
    return found


def _weights(folder: Path, config: ModelConfig, cls: Any, dtype: torch.dtype) -> Any:
    safetensors = None if config.allow_pickle else True  # None takes them where they are, else pickled weights
    try:
        model, report = cls.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=safetensors,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except SafetensorError as error:
        raise IncompleteModelError(f"the weights in {folder.name} are damaged: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"models.{config.name}: the model cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise IncompleteModelError(f"the model's files lack {len(missing)} weights, among them {missing[0]}")
    return model


def _mode(model: Any, device: torch.device, precision: Precision) -> str:
    try:
        why = differs_in_a_batch(model, device, precision.tolerance)
    except Exception as error:  # whatever a family's own code raises says that it cannot be run so
        why = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return "by steps" if why is None else why


def _most_bytes(model: Any) -> int:
    """Of the keys and values of one token, were no two heads to share theirs."""
    config = model.config.get_text_config(decoder=True)
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    return int(2 * layers * width * model.dtype.itemsize)


def _window(model: Any, max_input_tokens: int) -> int | None:
    if not model.config.is_encoder_decoder:
        return max_input_tokens
    positions = getattr(model.config, "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and hasattr(model.get_decoder(), "embed_positions") else None


def load_decoder(folder: Path) -> Tokenizer | SlowDecoder:
    """The tokenizer, for decoding only. Raises IncompleteModelError if none can be made."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers reads files of many kinds, and raises what their readers raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise IncompleteModelError(f"{folder.name}: no tokenizer can be made from the model's files: {why}") from error
    return getattr(tokenizer, "backend_tokenizer", None) or SlowDecoder(tokenizer)


def special_tokens(decoder: Tokenizer | SlowDecoder) -> frozenset[int]:
    """Ids that decoding leaves out."""
    if isinstance(decoder, SlowDecoder):
        return decoder.special
    return frozenset(i for i, token in decoder.get_added_tokens_decoder().items() if token.special)


def affordable_kv_tokens(loaded: LoadedGenerator, memory_reserve: float) -> int:
    """Tokens whose keys and values fit into the memory that is free now: ask once, before anything is generated."""
    if loaded.device.type == "cuda":
        budget = read_cuda(loaded.device).available_bytes * (1 - memory_reserve) * CUDA_SHARE
    else:
        budget = available_memory_bytes() * CPU_SHARE
    return max(1, int(budget / loaded.bytes_per_token))


def most_kv_tokens(loaded: LoadedGenerator, max_sequences: int) -> int:
    """Tokens that so many answers could ever use, with the beams that the model has by default."""
    beams = int(loaded.model.generation_config.num_beams or 1)
    return 2 * (loaded.window or loaded.max_input_tokens) * beams * max_sequences

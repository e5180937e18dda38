"""Tiny random models of every family, saved and loaded as a real one would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from serve_app.config import ModelConfig
from serve_app.model.loader import LoadedModel, load
from serve_app.types import TokenBatch

MAX_INPUT_TOKENS = 60

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}

_OWN: dict[str, dict[str, Any]] = {
    "albert": {**_COMMON, "embedding_size": 16, "num_hidden_groups": 2, "hidden_act": "gelu_new"},
    "bart": _ENCODER_DECODER,
    "deberta-v2": {
        **_COMMON,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "deberta": {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {
        "vocab_size": 97,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    "electra": {**_COMMON, "embedding_size": 16},
    "eurobert": {**_COMMON, **_GROUPED},
    "funnel": {
        "vocab_size": 97,
        "block_sizes": [1, 1, 1],
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
        "max_position_embeddings": 64,
    },
    "gpt_neo": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "window_size": 7,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "llama": {**_COMMON, **_GROUPED},
    "marian": _ENCODER_DECODER,
    "mbart": _ENCODER_DECODER,
    "mistral": {**_COMMON, **_GROUPED, "sliding_window": 7},
    "mobilebert": {
        **_COMMON,
        "embedding_size": 16,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
        "num_feedforward_networks": 2,
    },
    "modernbert": {
        **_COMMON,
        "local_attention": 10,
        "global_attn_every_n_layers": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "mpnet": _COMMON,
    "mt5": _T5,
    "nomic_bert": {**_COMMON, "head_dim": 8},
    "pegasus": _ENCODER_DECODER,
    "qwen2": {**_COMMON, **_GROUPED},
    "qwen3": {**_COMMON, **_GROUPED},
    "t5": _T5,
    "umt5": _T5,
    "xlnet": {"vocab_size": 97, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "pad_token_id": 1},
}


MASK = 5
"""The mask token of these models."""

CLASSES: dict[str, Any] = {
    "embedding": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "fill-mask": AutoModelForMaskedLM,
    "sparse-embedding": AutoModelForMaskedLM,
}


def tiny_model(model_type: str, seed: int = 0, task: str = "embedding", **keys: Any) -> PreTrainedModel:
    """A random float32 model in eval mode, with weights large enough that a wrong position or neighbour shows."""
    torch.manual_seed(seed)
    labels = {} if task == "question-answering" else {"num_labels": 3}
    config = AutoConfig.for_model(model_type, **{**_OWN.get(model_type, _COMMON), **labels, **keys})
    model = CLASSES[task].from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed_positions" not in name:
                weight.normal_(0.0, 0.25)
    return model


def load_tiny(model_type: str, folder: Path, seed: int = 0, **config: Any) -> LoadedModel:
    """A tiny model saved to `folder` and loaded from there, with the pooling and other keys of ModelConfig given."""
    tiny_model(model_type, seed).save_pretrained(folder)
    options: dict[str, Any] = {"device": "cpu", "max_input_tokens": MAX_INPUT_TOKENS, **config}
    model = ModelConfig(name=model_type, source="./tiny", **options)
    return load(folder, model, MAX_INPUT_TOKENS)


def load_tiny_for(
    task: str, model_type: str, folder: Path, device: str = "cpu", dtype: str = "auto", **keys: Any
) -> LoadedModel:
    """The same with the head of a task; `keys` are of the model's own config."""
    tiny_model(model_type, task=task, **keys).save_pretrained(folder)
    words = {f"word{token}": token for token in range(97) if token != MASK} | {"[MASK]": MASK}
    backend = Tokenizer(models.WordLevel(words, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]").save_pretrained(folder)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "max_input_tokens": MAX_INPUT_TOKENS, "task": task}
    model = ModelConfig(name=model_type, source="./tiny", **options)
    return load(folder, model, MAX_INPUT_TOKENS)


def batch_of(sequences: list[list[int]], token_types: list[list[int]] | None = None) -> TokenBatch:
    """The sequences as one request."""
    lengths = [len(sequence) for sequence in sequences]
    return TokenBatch(
        input_ids=np.concatenate([np.array(sequence, np.int32) for sequence in sequences]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        cu_requests=np.array([0, len(lengths)], np.int32),
        truncated=np.zeros(len(lengths), np.bool_),
        token_type_ids=None if token_types is None else np.concatenate(token_types).astype(np.int32),
    )


def random_sequences(lengths: list[int], seed: int) -> list[list[int]]:
    """Tokens 4 to 96: none of the special ones."""
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 97, length).tolist() for length in lengths]

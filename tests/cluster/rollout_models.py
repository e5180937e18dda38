"""Versions of tiny models for roll-outs, and the right answers of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from deploy.examples.make_tiny_models import ENCODER, byte_level, wordpiece

TEXTS = [
    "What is Deep Learning?",
    "My name is Sarah and I live in London.",
    "a small cat",
    "Paris is the capital of France. I like you, I love you; it's a good film.",
    "the tower is 324 metres tall " * 12,  # more than the longest input: read in windows where these are asked for
    "many requests at once",
]
LONGEST = 32


def write_encoder(folder: Path, seed: int) -> Path:
    """A BERT with random weights; its longest input is `LONGEST` tokens."""
    torch.manual_seed(seed)
    tokenizer = wordpiece()
    BertModel(BertConfig(vocab_size=len(tokenizer), **ENCODER)).save_pretrained(folder)
    tokenizer.model_max_length = LONGEST
    tokenizer.save_pretrained(folder)
    return folder


def with_other_vocabulary(source: Path, folder: Path) -> Path:
    """The same model with its tokens renumbered: equal vectors, and wrong ones where the two are mixed."""
    shutil.copytree(source, folder)
    told = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary: dict[str, int] = told["model"]["vocab"]
    words = sorted((word for word in vocabulary if not word.startswith("[")), key=vocabulary.__getitem__)
    numbers = [vocabulary[word] for word in words]
    renumbered = dict(zip(words, reversed(numbers), strict=True))
    told["model"]["vocab"] = {**vocabulary, **renumbered}
    (folder / "tokenizer.json").write_text(json.dumps(told), "utf-8")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    old = weights[name].clone()
    for word in words:
        weights[name][renumbered[word]] = old[vocabulary[word]]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def damaged(source: Path, folder: Path, file: str) -> Path:
    """A copy in which one file is cut in the middle."""
    shutil.copytree(source, folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    return folder


def not_numbers(source: Path, folder: Path) -> Path:
    """A copy whose weights load, and of which every forward pass makes NaN."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def unsupported(source: Path, folder: Path) -> Path:
    """A copy that a replica refuses in its constructor."""
    shutil.copytree(source, folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "some.where.Mystery", "path": "", "idx": 0}]))
    return folder


def vectors(folder: Path, texts: Sequence[str] = TEXTS) -> npt.NDArray[np.float32]:
    """Mean pooled, not normalised, each text alone and cut to `LONGEST` tokens, as transformers computes them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            encoded = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
            rows.append(model(**encoded).last_hidden_state[0].mean(0).numpy())
    return np.stack(rows)


def write_decoder(folder: Path, seed: int) -> Path:
    """A GPT-2 with random weights."""
    torch.manual_seed(seed)
    tokenizer = byte_level()
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=None, pad_token_id=1, **sizes)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # so that answers differ from text to text
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generated(folder: Path, texts: Sequence[str], new_tokens: int) -> list[str]:
    """What `generate` adds to each text, without sampling."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            made = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=1)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers

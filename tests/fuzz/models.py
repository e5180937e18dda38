"""A tiny model of every task, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from deploy.examples.make_tiny_models import MODELS, classifier, make
from serve_app.config import ModelConfig

EMBEDDING = "embedding"

TASKS: Mapping[str, str] = {
    EMBEDDING: EMBEDDING,
    **{name: name for name in MODELS},
    "zero-shot": "zero-shot-classification",
    "text2text": "text2text-generation",
}
"""The task of each model, by its name in deploy/examples/all-tasks.yaml."""


def make_all(into: Path) -> list[ModelConfig]:
    """Write all models, an embedding one too, which the example takes from a package."""
    make(into)
    torch.manual_seed(0)
    model, tokenizer = classifier("BertModel")()
    model.eval().save_pretrained(into / EMBEDDING)
    tokenizer.save_pretrained(into / EMBEDDING)
    return [ModelConfig(name=name, source=str(into / name), task=task) for name, task in TASKS.items()]

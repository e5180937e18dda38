"""This project and its peers, side by side: the same model, texts, load generator and machine, in one run.

    tests/bench/peers/install.sh
    python tests/bench/peers/compare.py --seconds 20 --repeats 5 --json bench-results/peers.json

In every round each server in turn is started, measured in every scenario and stopped; the next round begins with the
next one, so that a slow hour of the machine does not fall on one of them. Only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from serve_app.cli.bench.ceiling import CeilingPlan, direct_vectors, measure_ceiling
from serve_app.cli.bench.command import DEFAULT_MODEL, describe, model_folder
from serve_app.cli.bench.corpus import Corpus, make_corpus
from serve_app.cli.bench.load import Plan
from serve_app.cli.bench.measure import Measured, Sample, Scenario, Verdict, parse_scenarios, run_scenario, verify
from serve_app.cli.bench.processes import ServerProcesses, available_cores
from serve_app.cli.bench.report import machine
from serve_app.cli.bench.server import ServerError, launched
from serve_app.cli.bench.wire import Prepared, ProtocolName, Target, prepare
from serve_app.config import ModelConfig
from serve_app.tasks.card import read_card
from serve_app.types import FloatArray, ModelCard

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OURS = "serve_app"


@dataclass(frozen=True, slots=True)
class Server:
    """How one contestant is started. {model}, {port} and {venv} stand for what they say, in all but names."""

    name: str
    command: tuple[str, ...]
    venv: str | None = None
    port: int = 8090
    protocol: ProtocolName = "tei"
    path: str = "/embed"
    folder: str = "."
    environment: Mapping[str, str] = field(default_factory=dict)

    def target(self) -> Target:
        return Target("127.0.0.1", self.port, self.protocol, "default", self.path)

    def filled(self, text: str, model: Path, environments: Path) -> str:
        venv = environments / self.venv if self.venv else Path(sys.executable).parents[1]
        return text.format(model=model, port=self.port, venv=venv)


def infinity(engine: str, model: str, *options: str) -> tuple[str, ...]:
    command = ("{venv}/bin/infinity_emb", "v2", "--model-id", model, "--served-model-name", "default")
    where = ("--engine", engine, "--device", "cpu", "--host", "127.0.0.1", "--port", "{port}", "--log-level", "error")
    return (*command, *where, *options)


def script(path: str, *options: str) -> tuple[str, ...]:
    return ("{venv}/bin/python", str(HERE / path), "{model}", "{port}", *options)


SERVERS = {
    server.name: server
    for server in (
        Server(
            OURS,
            ("{venv}/bin/python", "-m", "serve_app.cli.main", "serve", str(ROOT / "serve_config.yaml")),
            port=8000,
        ),
        Server(
            "infinity-torch",
            infinity("torch", "{model}"),
            venv="infinity",
            protocol="openai",
            path="/embeddings",
            environment={"DO_NOT_TRACK": "1"},
        ),
        Server(
            "infinity-onnx",
            # By default it pools the first token, which this model was not trained for.
            # And it finds a model's file only below the folder that it is started in.
            infinity("optimum", ".", "--pooling-method", "mean"),
            venv="infinity",
            protocol="openai",
            path="/embeddings",
            folder="{venv}/onnx-model",
            environment={"DO_NOT_TRACK": "1", "HF_HOME": "{venv}/hf"},
        ),
        Server("litserve", script("litserve/server.py"), "litserve"),
        Server("ray-tutorial", script("ray_tutorial/app.py"), "ray_tutorial"),
        Server("ray-batch-tutorial", script("ray_tutorial/app.py", "batch"), "ray_tutorial"),
        Server("fastapi-pipeline", script("fastapi_pipeline/server.py"), "fastapi_pipeline"),
    )
}


@dataclass(slots=True)
class Found:
    """What one server did in one scenario, over the rounds."""

    measured: list[Measured] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def typical(self, figure: str) -> float:
        return float(median(getattr(one, figure) for one in self.measured))

    def verdict(self, server: Server, card: ModelCard, reference: FloatArray) -> Verdict:
        return verify(self.samples, server.protocol, card.hidden_size, reference)


Results = dict[str, dict[Scenario, Found]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run that is ready to start."""

    args: argparse.Namespace
    model: Path
    card: ModelCard
    corpus: Corpus
    servers: Sequence[Server]
    scenarios: Sequence[Scenario]

    def run(self) -> dict[str, Any]:
        reference = direct_vectors(self._ceiling_plan())
        results: Results = {server.name: {scenario: Found() for scenario in self.scenarios} for server in self.servers}
        ceilings = [measure_ceiling(self._ceiling_plan())]
        for round_ in range(self.args.repeats):
            first = round_ % len(self.servers)
            for server in (*self.servers[first:], *self.servers[:first]):
                self._one_round(server, results[server.name])
        ceilings.append(measure_ceiling(self._ceiling_plan()))
        tokens_per_s = sum(ceiling.tokens_per_s for ceiling in ceilings) / len(ceilings)
        print(table(results, tokens_per_s))
        return {
            "machine": machine(),
            "corpus": describe(self.corpus, self.card),
            "ceilings": [asdict(ceiling) for ceiling in ceilings],
            "servers": {server.name: self._told(server, results[server.name], reference) for server in self.servers},
        }

    def _ceiling_plan(self) -> CeilingPlan:
        return CeilingPlan(
            model_path=str(self.model),
            max_input_tokens=self.card.max_input_tokens,
            texts=self.args.texts,
            seed=self.args.seed,
            processes=1,
            threads=available_cores(),
            budgets=(1024, 2048, 4096),
        )

    def _one_round(self, server: Server, found: dict[Scenario, Found]) -> None:
        with self._started(server) as processes:
            for scenario in self.scenarios:
                print(f"{server.name} {scenario}", file=sys.stderr, flush=True)
                plan = Plan(scenario.connections, self.args.seconds, self.args.warmup, timeout_s=300)
                measured, samples = run_scenario(server.target(), self._requests(server, scenario), plan, processes)
                found[scenario].measured.append(measured)
                found[scenario].samples += samples

    @contextlib.contextmanager
    def _started(self, server: Server) -> Iterator[ServerProcesses]:
        environments = self.args.environments.absolute()

        def filled(text: str) -> str:
            return server.filled(text, self.model, environments)

        with launched(
            command=[filled(part) for part in server.command],
            target=server.target(),
            probe=self._requests(server, Scenario(1, 1))[0],
            log=environments / f"{server.name}.log",
            environment={"HF_HUB_OFFLINE": "1", **{key: filled(value) for key, value in server.environment.items()}},
            folder=Path(filled(server.folder)),
        ) as pid:
            yield ServerProcesses((pid,))

    def _requests(self, server: Server, scenario: Scenario) -> list[Prepared]:
        computed = self.corpus.computed_tokens(self.card.max_input_tokens)
        return prepare(self.corpus, computed, scenario.texts_per_request, server.target())

    def _told(self, server: Server, found: dict[Scenario, Found], reference: FloatArray) -> dict[str, Any]:
        told = {}
        for scenario, one in found.items():
            verdict = one.verdict(server, self.card, reference)
            if verdict.wrong:
                print(f"{server.name} {scenario}: {verdict.wrong} of {verdict.checked} wrong: {verdict.reason}")
            told[str(scenario)] = {"rounds": [asdict(each) for each in one.measured], "verdict": asdict(verdict)}
        return told


def table(results: Results, ceiling_tokens_per_s: float) -> str:
    """Texts per second by scenario, the share of the ceiling, our ratio to each in the same rounds, p50 and errors."""
    head = f"{'scenario':<9} {'server':<19} {'texts/s':>8} {'ceiling':>8} {'ours is':>8} {'p50 ms':>8} {'p99 ms':>8}"
    lines = [f"{head} {'CPU s/1000':>10} {'USS MiB':>8} {'errors':>7}"]
    for scenario in next(iter(results.values())):
        lines += [_line(name, scenario, results, ceiling_tokens_per_s) for name in results]
    return "\n".join(lines)


def _line(name: str, scenario: Scenario, results: Results, ceiling_tokens_per_s: float) -> str:
    found = results[name][scenario]
    uss = median(one.server.uss_bytes for one in found.measured if one.server is not None) / (1 << 20)
    errors = sum(sum(one.errors.values()) for one in found.measured)
    cpu = median(one.server_cpu_s_per_1000_texts or 0.0 for one in found.measured)
    return (
        f"{scenario!s:<9} {name:<19} {found.typical('texts_per_s'):8.1f} "
        f"{found.typical('tokens_per_s') / ceiling_tokens_per_s:8.1%} {_ratio(scenario, found, results):>8} "
        f"{found.typical('p50_s') * 1000:8.1f} {found.typical('p99_s') * 1000:8.1f} {cpu:10.2f} {uss:8.0f} {errors:7d}"
    )


def _ratio(scenario: Scenario, found: Found, results: Results) -> str:
    """How many times as fast ours is: the median of the ratios in each round."""
    if OURS not in results:
        return "-"
    pairs = zip(results[OURS][scenario].measured, found.measured, strict=True)
    return f"{median(ours.tokens_per_s / max(theirs.tokens_per_s, 1e-9) for ours, theirs in pairs):.2f} x"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", default=",".join(SERVERS), help="names, of: %(default)s")
    parser.add_argument("--scenarios", default="1x1,32x1,128x1,8x32", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured, each time (default: %(default)s)")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds of load before (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=1024, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument(
        "--environments", type=Path, default=Path(os.environ.get("PEERS_ROOT", ROOT / "bench-results" / "peers"))
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    model = model_folder(args.model_path)
    comparison = Comparison(
        args=args,
        model=model,
        card=read_card(model, ModelConfig(name="bench", source=str(model)), ""),
        corpus=make_corpus(model, args.texts, args.seed),
        servers=[SERVERS[name.strip()] for name in args.servers.split(",")],
        scenarios=parse_scenarios(args.scenarios),
    )
    try:
        told = comparison.run()
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        args.json.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

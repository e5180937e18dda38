"""What a run found, as a table to read and as JSON to keep."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import mean, median
from typing import Any

from serve_app.cli.bench.ceiling import Ceiling
from serve_app.cli.bench.measure import Measured, Scenario, Verdict

_HEAD = (
    "scenario",
    "texts/s",
    "range",
    "tokens/s",
    "of ceiling",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "errors",
    "CPU s/1000",
    "client CPU",
)

QUIET = 0.9
"""Of two ceilings measured on a machine that does nothing else, the lower is at least this part of the higher."""


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """The repeats of one scenario, `seconds` each, and what was wrong with the answers."""

    scenario: Scenario
    seconds: float
    repeats: Sequence[Measured]
    verdict: Verdict

    def typical(self, figure: str) -> float | None:
        """Median over the repeats."""
        values = [getattr(measured, figure) for measured in self.repeats]
        return None if None in values else median(values)

    @property
    def errors(self) -> Mapping[str, int]:
        return sum((Counter(measured.errors) for measured in self.repeats), Counter())


@dataclass(frozen=True, slots=True)
class Report:
    """One run. `ceilings` are those measured before and after the server; none if that was not asked for."""

    server: str
    corpus: str
    results: Sequence[ScenarioResult]
    ceilings: Sequence[Ceiling] = ()
    machine: Mapping[str, str] = field(default_factory=lambda: machine())

    @property
    def ceiling_tokens_per_s(self) -> float | None:
        return mean(ceiling.tokens_per_s for ceiling in self.ceilings) if self.ceilings else None

    @property
    def failed(self) -> bool:
        """Whether any request failed or any answer that was looked at is wrong."""
        return any(result.errors or result.verdict.wrong for result in self.results)

    def share(self, result: ScenarioResult) -> float | None:
        """Tokens per second against the ceiling's, which does not depend on which texts fell into the window."""
        tokens, ceiling = result.typical("tokens_per_s"), self.ceiling_tokens_per_s
        return None if ceiling is None or tokens is None else tokens / ceiling


def machine() -> Mapping[str, str]:
    packages = ("ray", "torch", "transformers", "tokenizers")
    return {
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def is_quiet(speeds: Sequence[float]) -> bool:
    """Whether ceilings, in tokens per second, are so alike that what lies between them can be compared with them."""
    return not speeds or min(speeds) >= QUIET * max(speeds)


def as_text(report: Report) -> str:
    lines = [f"{key:<9}{value}" for key, value in _facts(report)]
    rows = [_HEAD, *(_row(report, result) for result in report.results)]
    return "\n".join([*lines, "", *_table(rows), *_complaints(report)])


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = report.machine
    return [
        ("server", report.server),
        ("machine", f"{facts['cores']} cores, {facts['processor']}, torch {facts['torch']}, ray {facts['ray']}"),
        ("corpus", report.corpus),
        *(("ceiling", _ceiling(ceiling)) for ceiling in report.ceilings),
    ]


def _ceiling(ceiling: Ceiling) -> str:
    whole = ceiling.tokenize_s + ceiling.forward_s + ceiling.postprocess_s
    return (
        f"{ceiling.texts_per_s:.1f} texts/s, {ceiling.tokens_per_s:,.0f} tokens/s in process, without a server "
        f"(budget {ceiling.budget}, {ceiling.attention}; tokenizing {ceiling.tokenize_s / whole:.1%}, "
        f"postprocessing {ceiling.postprocess_s / whole:.1%})"
    )


def _row(report: Report, result: ScenarioResult) -> tuple[str, ...]:
    rates = [measured.texts_per_s for measured in result.repeats]
    client = mean(measured.client_cpu_s for measured in result.repeats) / result.seconds
    return (
        str(result.scenario),
        f"{median(rates):.1f}",
        f"{min(rates):.1f}-{max(rates):.1f}",
        _figure(result.typical("tokens_per_s"), "{:,.0f}"),
        _figure(report.share(result), "{:.1%}"),
        *(_figure(result.typical(f"p{p}_s"), "{:.1f}", 1000) for p in (50, 95, 99)),
        ", ".join(f"{count} x {name}" for name, count in result.errors.items()) or "0",
        _figure(result.typical("server_cpu_s_per_1000_texts"), "{:.2f}"),
        f"{client:.1%}",
    )


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value * unit)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _complaints(report: Report) -> list[str]:
    lines = [
        f"{result.scenario}: {result.verdict.wrong} of {result.verdict.checked} answers looked at are wrong, "
        f"the first: {result.verdict.reason}"
        for result in report.results
        if result.verdict.wrong
    ]
    if not is_quiet([ceiling.tokens_per_s for ceiling in report.ceilings]):
        lines.append("the ceilings before and after differ: other work ran here, so keep no figure of this run")
    return lines


def as_json(report: Report) -> dict[str, Any]:
    """The report with its derived figures: medians by scenario, and the share of the ceiling."""
    figures = ("texts_per_s", "tokens_per_s", "p50_s", "p95_s", "p99_s", "server_cpu_s_per_1000_texts")
    scenarios = [
        {
            **asdict(result),
            "scenario": str(result.scenario),
            "share_of_ceiling": report.share(result),
            "median": {name: result.typical(name) for name in figures},
        }
        for result in report.results
    ]
    ceilings = [asdict(ceiling) for ceiling in report.ceilings]
    return {**asdict(report), "results": scenarios, "ceilings": ceilings}

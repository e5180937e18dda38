"""Whether a server grows under traffic of mixed lengths that lasts for minutes or hours.

The rule is that of Triton's L0_memory_growth test: samples are taken over the run, the first half is dropped (caches
fill, allocators settle), and what is left must not rise further above its mean than a bound. A server that grows
steadily by g over the second half rises g / 2 above it.

The sum of all processes can hide one that grows, so the resident memory of each is judged by itself: the line through
its samples after the first two minutes must not rise further than what is allowed for its kind.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import numpy as np

from serve_app.cli.bench.load import ClosedLoop, Outcome, Plan
from serve_app.cli.bench.processes import ServerProcesses, Usage
from serve_app.cli.bench.wire import Prepared, Target

MIB = 1 << 20
FEWEST_SAMPLES = 8

_TASKS = re.compile(r"^ray_serve_app_event_loop_tasks(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Bound:
    """How far the highest value may lie above the mean: the larger of `absolute` and the mean's `fraction`."""

    unit: str
    scale: float
    absolute: float
    fraction: float

    def allowed(self, mean: float) -> float:
        return max(self.absolute, self.fraction * mean)


BOUNDS: Mapping[str, Bound] = {
    "uss_bytes": Bound("MiB", MIB, 24 * MIB, 0.02),
    "descriptors": Bound("", 1, 24, 0.03),
    "threads": Bound("", 1, 12, 0.03),
    "processes": Bound("", 1, 1, 0.0),
    "tasks": Bound("", 1, 24, 0.03),
}
"""What is watched. Above the noise of a Ray cluster at rest, and below what a month of growth could hide."""


SETTLE_S = 120.0
"""Of each process, until its memory is judged; half of its samples where there are only a few minutes."""

LEAST_SLOPE_IN_ERRORS = 3.0
"""A slope counts from so many times its standard error on: below, it may be noise."""

PROCESS_BOUNDS: Mapping[str, Bound] = {
    "model replica": Bound("MiB", MIB, 48 * MIB, 0.10),
    "tokenizer replica": Bound("MiB", MIB, 32 * MIB, 0.10),
    "ingress replica": Bound("MiB", MIB, 32 * MIB, 0.10),
    "Serve": Bound("MiB", MIB, 32 * MIB, 0.10),
    "HAProxy": Bound("MiB", MIB, 16 * MIB, 0.10),
    "other": Bound("MiB", MIB, 64 * MIB, 0.20),
}
"""How far the resident memory of a process of each kind may rise. One batch's memory, which comes and goes, is less."""


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """How long and how hard, and how often the server's processes are looked at."""

    seconds: float
    connections: int = 16
    interval_s: float = 5.0
    warmup_s: float = 5.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SoakSample:
    """The server's processes after so many seconds and answers."""

    at_s: float
    answers: int
    usage: Usage
    tasks: int | None = None
    """asyncio tasks in all replicas, where the server tells."""

    def value(self, quantity: str) -> float | None:
        return self.tasks if quantity == "tasks" else float(getattr(self.usage, quantity))


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity over the second half of the run."""

    quantity: str
    mean: float
    highest: float
    allowed: float
    per_hour: float
    """Slope of the line through the samples."""

    @property
    def rise(self) -> float:
        return self.highest - self.mean

    @property
    def grows(self) -> bool:
        return self.rise > self.allowed


@dataclass(frozen=True, slots=True)
class ProcessGrowth:
    """Resident memory of one process since it had settled."""

    kind: str
    pid: int
    first: float
    last: float
    rise: float
    """Of the line through the samples, over their time."""
    allowed: float
    per_hour: float
    """Slope of the line."""
    error_per_hour: float
    """Standard error of the slope."""

    @property
    def grows(self) -> bool:
        return self.rise > self.allowed and self.per_hour > LEAST_SLOPE_IN_ERRORS * self.error_per_hour


@dataclass(frozen=True, slots=True)
class SoakReport:
    samples: Sequence[SoakSample]
    growth: Sequence[Growth]
    processes: Sequence[ProcessGrowth]
    answers: int
    texts: int
    lengths: int
    """How many different numbers of tokens the requests have."""
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        growing = [growth.grows for growth in self.growth] + [growth.grows for growth in self.processes]
        return bool(self.errors) or any(growing)


def mixed_requests(prepare: Callable[[int], list[Prepared]], seed: int) -> list[Prepared]:
    """Requests of one, few and many texts in random order; about as many texts in each kind."""
    requests = [request for texts in (1, 4, 32) for request in prepare(texts)]
    random.Random(seed).shuffle(requests)
    return requests


def soak(
    target: Target,
    requests: Sequence[Prepared],
    plan: SoakPlan,
    server: ServerProcesses,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> SoakReport:
    """Drive the server for the whole time, look at it every few seconds, and judge."""
    return asyncio.run(_Soak(target, requests, plan, server, on_outcome).run())


class _Soak:
    def __init__(
        self,
        target: Target,
        requests: Sequence[Prepared],
        plan: SoakPlan,
        server: ServerProcesses,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._plan, self._server, self._on_outcome = plan, server, on_outcome
        self._target = target
        self._requests = requests
        load = Plan(plan.connections, plan.seconds, plan.warmup_s, samples=0)
        self._loop = ClosedLoop(target.host, target.port, requests, load, keep=False)
        self._samples: list[SoakSample] = []
        self._statuses: Counter[str] = Counter()
        self._texts = 0

    async def run(self) -> SoakReport:
        watcher = asyncio.create_task(self._watch())
        await self._loop.run(on_outcome=self._count)
        await watcher
        answers = self._statuses.pop("200", 0)
        return SoakReport(
            samples=self._samples,
            growth=judge(self._samples),
            processes=judge_processes(self._samples),
            answers=answers,
            texts=self._texts,
            lengths=len({request.tokens for request in self._requests}),
            errors=dict(self._statuses),
        )

    def _count(self, outcome: Outcome) -> None:
        self._statuses[str(outcome.status or "no answer")] += 1
        self._texts += self._requests[outcome.request].texts if outcome.status == 200 else 0
        self._on_outcome(outcome)

    async def _watch(self) -> None:
        await asyncio.sleep(self._plan.warmup_s)
        started = time.perf_counter()
        while (at_s := time.perf_counter() - started) < self._plan.seconds:
            usage = await asyncio.to_thread(self._server.usage)
            tasks = await asyncio.to_thread(event_loop_tasks, self._target)
            self._samples.append(SoakSample(at_s, self._statuses["200"], usage, tasks))
            await asyncio.sleep(self._plan.interval_s)


def event_loop_tasks(target: Target) -> int | None:
    """Sum of the replicas' `serve_app_event_loop_tasks`, some seconds old; None where the server does not tell."""
    try:
        answer = httpx.get(f"http://{target.host}:{target.port}/metrics", timeout=10.0, trust_env=False)
    except httpx.HTTPError:
        return None
    counts = [float(value) for value in _TASKS.findall(answer.text)]
    return int(sum(counts)) if counts else None


def judge(samples: Sequence[SoakSample]) -> list[Growth]:
    """Each watched quantity over the second half of the samples. Raises ValueError if they are too few to say."""
    if len(samples) < FEWEST_SAMPLES:
        raise ValueError(f"{len(samples)} samples are too few to judge growth by; take at least {FEWEST_SAMPLES}")
    settled = samples[len(samples) // 2 :]
    told = {quantity: [sample.value(quantity) for sample in settled] for quantity in BOUNDS}
    hours = [sample.at_s / 3600 for sample in settled]
    return [
        _growth(quantity, [value for value in values if value is not None], hours)
        for quantity, values in told.items()
        if None not in values
    ]


def _growth(quantity: str, values: Sequence[float], hours: Sequence[float]) -> Growth:
    mean = float(np.mean(values))
    return Growth(
        quantity=quantity,
        mean=mean,
        highest=float(max(values)),
        allowed=BOUNDS[quantity].allowed(mean),
        per_hour=float(np.polyfit(hours, values, 1)[0]),
    )


def judge_processes(samples: Sequence[SoakSample]) -> list[ProcessGrowth]:
    """Each process with enough samples after it has settled, by kind."""
    memory: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for sample in samples:
        for resident in sample.usage.resident:
            memory.setdefault((resident.kind, resident.pid), []).append((sample.at_s, resident.rss_bytes))
    settled = {process: _settled(points) for process, points in memory.items()}
    return [
        _process_growth(kind, pid, points)
        for (kind, pid), points in sorted(settled.items())
        if len(points) >= FEWEST_SAMPLES // 2
    ]


def _settled(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    first_s, last_s = points[0][0], points[-1][0]
    return [point for point in points if point[0] >= first_s + min(SETTLE_S, (last_s - first_s) / 2)]


def _process_growth(kind: str, pid: int, points: Sequence[tuple[float, int]]) -> ProcessGrowth:
    hours, values = np.array([at_s / 3600 for at_s, _ in points]), np.array([float(rss) for _, rss in points])
    slope, level = np.polyfit(hours, values, 1)
    deviation = np.sqrt(((values - slope * hours - level) ** 2).sum() / (len(points) - 2))
    return ProcessGrowth(
        kind=kind,
        pid=pid,
        first=float(values[0]),
        last=float(values[-1]),
        rise=float(slope * (hours[-1] - hours[0])),
        allowed=PROCESS_BOUNDS[kind].allowed(float(values.mean())),
        per_hour=float(slope),
        error_per_hour=float(deviation / np.sqrt(((hours - hours.mean()) ** 2).sum())),
    )


def soak_text(report: SoakReport) -> str:
    """Some samples to see the course of the run, then the verdicts."""
    shown = [report.samples[i] for i in np.linspace(0, len(report.samples) - 1, 12).round().astype(int)]
    lines = [" seconds   answers   USS MiB  descriptors  threads  processes  tasks"]
    lines += [
        f"{sample.at_s:8.0f}  {sample.answers:8d}  {sample.usage.uss_bytes / MIB:8.1f}  "
        f"{sample.usage.descriptors:11d}  {sample.usage.threads:7d}  {sample.usage.processes:9d}  "
        f"{'-' if sample.tasks is None else sample.tasks:>5}"
        for sample in shown
    ]
    errors = ", ".join(f"{count} x {name}" for name, count in report.errors.items()) or "none"
    lines += [
        "",
        f"{report.answers} answers for {report.texts} texts, in requests of {report.lengths} different lengths, "
        f"errors: {errors}",
        *map(_verdict, report.growth),
        "",
        "resident memory, MiB       pid    first     last     rise  allowed  slope an hour",
        *map(_process_verdict, report.processes),
    ]
    return "\n".join(lines)


def soak_json(report: SoakReport) -> dict[str, Any]:
    growth = [{**asdict(growth), "grows": growth.grows} for growth in report.growth]
    processes = [{**asdict(growth), "grows": growth.grows} for growth in report.processes]
    return {**asdict(report), "growth": growth, "processes": processes}


def _verdict(growth: Growth) -> str:
    bound = BOUNDS[growth.quantity]
    word = "GROWS" if growth.grows else "steady"
    rise, allowed, slope = (value / bound.scale for value in (growth.rise, growth.allowed, growth.per_hour))
    unit = f" {bound.unit}" if bound.unit else ""
    return (
        f"{growth.quantity:<12}{word:<8}highest - mean of the second half {rise:.1f}{unit} (allowed {allowed:.1f}), "
        f"slope {slope:+.1f}{unit} an hour"
    )


def _process_verdict(growth: ProcessGrowth) -> str:
    figures = (growth.first, growth.last, growth.rise, growth.allowed)
    return (
        f"{growth.kind:<18}{'GROWS' if growth.grows else 'steady':<8}{growth.pid:>7}"
        + "".join(f"{value / MIB:9.1f}" for value in figures)
        + f"  {growth.per_hour / MIB:+8.1f} ± {growth.error_per_hour / MIB:.1f}"
    )

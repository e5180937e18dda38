"""Whether a server grows under traffic of mixed lengths that lasts for minutes or hours.

The rule is that of Triton's L0_memory_growth test: samples are taken over the run, the first half is dropped (caches
fill, allocators settle), and what is left must not rise further above its mean than a bound. A server that grows
steadily by g over the second half rises g / 2 above it.
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
class SoakReport:
    samples: Sequence[SoakSample]
    growth: Sequence[Growth]
    answers: int
    texts: int
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return bool(self.errors) or any(growth.grows for growth in self.growth)


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
        return SoakReport(self._samples, judge(self._samples), answers, self._texts, dict(self._statuses))

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
    lines += ["", f"{report.answers} answers for {report.texts} texts, errors: {errors}"]
    return "\n".join([*lines, *map(_verdict, report.growth)])


def soak_json(report: SoakReport) -> dict[str, Any]:
    growth = [{**asdict(growth), "grows": growth.grows} for growth in report.growth]
    return {**asdict(report), "growth": growth}


def _verdict(growth: Growth) -> str:
    bound = BOUNDS[growth.quantity]
    word = "GROWS" if growth.grows else "steady"
    rise, allowed, slope = (value / bound.scale for value in (growth.rise, growth.allowed, growth.per_hour))
    unit = f" {bound.unit}" if bound.unit else ""
    return (
        f"{growth.quantity:<12}{word:<8}highest - mean of the second half {rise:.1f}{unit} (allowed {allowed:.1f}), "
        f"slope {slope:+.1f}{unit} an hour"
    )

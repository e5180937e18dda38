"""One scenario, once: load on, clock on, clock off, and the figures."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.cli.bench.load import CONNECTION_LOST, ClosedLoop, Outcome, Plan, Window
from serve_app.cli.bench.processes import ServerProcesses, Usage
from serve_app.cli.bench.wire import Prepared, ProtocolName, Target, count_answers, read_vectors
from serve_app.errors import ConfigError
from serve_app.types import FloatArray

LEAST_COSINE = 0.9999


@dataclass(frozen=True, slots=True)
class Scenario:
    """So many connections, each sending so many texts a request."""

    connections: int
    texts_per_request: int

    def __str__(self) -> str:
        return f"{self.connections}x{self.texts_per_request}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen from outside; latencies in seconds, of the requests that began while the clock ran."""

    texts_per_s: float
    tokens_per_s: float
    requests: int
    p50_s: float
    p95_s: float
    p99_s: float
    errors: Mapping[str, int]
    client_cpu_s: float
    server_cpu_s_per_1000_texts: float | None = None
    server: Usage | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer that was kept, and which texts it is for."""

    first: int
    texts: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of the answers that were looked at: how many are wrong, why the first one is, and the lowest cosine seen."""

    checked: int = 0
    wrong: int = 0
    reason: str = ""
    least_cosine: float | None = None


def parse_scenarios(text: str) -> list[Scenario]:
    """`32x1,8x32` as scenarios. Raises ConfigError."""
    scenarios = []
    for part in text.split(","):
        connections, _, texts = part.strip().partition("x")
        if not (connections.isdigit() and texts.isdigit() and int(connections) and int(texts)):
            raise ConfigError(f"--scenarios: {part.strip()!r} is not <connections>x<texts in a request>, as in 32x1")
        scenarios.append(Scenario(int(connections), int(texts)))
    return scenarios


def run_scenario(
    target: Target,
    requests: Sequence[Prepared],
    plan: Plan,
    server: ServerProcesses | None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Measured, list[Sample]]:
    """Drive the server for one window. The figures, and a sample of the answers."""
    loop = ClosedLoop(target.host, target.port, requests, plan)
    clock = _Clock(server)
    window = asyncio.run(loop.run(clock.start, clock.end, on_outcome))
    measured = summarize(loop.outcomes, requests, window, clock.client_cpu_s, clock.server_cpu_s, server)
    kept = [(outcome, requests[outcome.request]) for outcome in loop.outcomes if outcome.body is not None]
    return measured, [Sample(request.first, request.texts, outcome.body or b"") for outcome, request in kept]


class _Clock:
    """CPU time of both sides, while the window is open."""

    def __init__(self, server: ServerProcesses | None) -> None:
        self._server = server
        self.client_cpu_s = 0.0
        self.server_cpu_s: float | None = None

    def start(self) -> None:
        if self._server is not None:
            self._server.mark()
        self.client_cpu_s = -time.process_time()

    def end(self) -> None:
        self.client_cpu_s += time.process_time()
        if self._server is not None:
            self.server_cpu_s = self._server.cpu_s()


def summarize(
    outcomes: Sequence[Outcome],
    requests: Sequence[Prepared],
    window: Window,
    client_cpu_s: float = 0.0,
    server_cpu_s: float | None = None,
    server: ServerProcesses | None = None,
) -> Measured:
    """Figures of one window; only answers with status 200 count as work done."""
    done = [(outcome, requests[outcome.request]) for outcome in outcomes if outcome.status == 200]
    texts = sum(window.share(outcome) * request.texts for outcome, request in done)
    tokens = sum(window.share(outcome) * request.tokens for outcome, request in done)
    began = [outcome for outcome in outcomes if window.began(outcome)]
    latencies = [outcome.ended - outcome.started for outcome in began if outcome.status == 200]
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)).tolist() if latencies else (0.0, 0.0, 0.0)
    return Measured(
        texts_per_s=texts / window.seconds,
        tokens_per_s=tokens / window.seconds,
        requests=len(began),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        errors=dict(Counter(_name(outcome.status) for outcome in began if outcome.status != 200)),
        client_cpu_s=client_cpu_s,
        server_cpu_s_per_1000_texts=None if server_cpu_s is None or not texts else server_cpu_s / texts * 1000,
        server=None if server is None else server.usage(),
    )


def _name(status: int) -> str:
    return "no answer" if status == CONNECTION_LOST else str(status)


def verify(
    samples: Sequence[Sample], protocol: ProtocolName, dimensions: int, reference: FloatArray | None = None
) -> Verdict:
    """Look at the kept answers: as many vectors as texts, of the right length and, given the reference, right.

    `reference` (corpus, d) holds the vector of each text, at any length; cosines are compared.
    """
    wrong, reason, least = 0, "", None
    for sample in samples:
        try:
            cosine = _check(sample, protocol, dimensions, reference)
        except ValueError as error:
            wrong, reason = wrong + 1, reason or str(error)
            continue
        if cosine is not None:
            least = cosine if least is None else min(least, cosine)
    return Verdict(len(samples), wrong, reason, least)


def verify_counts(samples: Sequence[Sample], per_text: bool) -> Verdict:
    """Look at the kept answers of a task beside embedding: a list, of as many elements as there were texts."""
    reasons = [reason for sample in samples if (reason := _why_wrong(sample, per_text))]
    return Verdict(len(samples), len(reasons), reasons[0] if reasons else "")


def _why_wrong(sample: Sample, per_text: bool) -> str:
    try:
        count = count_answers(sample.body)
    except ValueError as error:
        return str(error)
    right = not per_text or sample.texts == 1 or count == sample.texts
    return "" if right else f"{count} answers for {sample.texts} texts"


def _check(sample: Sample, protocol: ProtocolName, dimensions: int, reference: FloatArray | None) -> float | None:
    vectors = read_vectors(sample.body, protocol)
    if vectors.shape != (sample.texts, dimensions):
        raise ValueError(f"vectors of shape {vectors.shape} for {sample.texts} texts of {dimensions} dimensions")
    if reference is None:
        return None
    least = float(cosines(vectors, reference[sample.first : sample.first + sample.texts]).min())
    if not least > LEAST_COSINE:
        raise ValueError(f"cosine {least:.5f} with direct computation")
    return least


def cosines(left: FloatArray, right: FloatArray) -> FloatArray:
    """Of each row of one (n, d) with the same row of the other."""
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    found: FloatArray = (left * right).sum(axis=1) / np.maximum(lengths, 1e-12)
    return found

"""Bursts of requests, a target at a time; after each, a good request must be answered as it was at the start."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from tests.fuzz.requests import Fuzzed, make
from tests.fuzz.schemas import Valid
from tests.fuzz.targets import Target, shares, targets
from tests.fuzz.verdict import Verdict, changed
from tests.fuzz.wire import Answer, Wire

ROUNDS = 2
"""Each of half the requests for every target, so that the second shows what grows."""

CONNECTIONS = 8
ENOUGH = 20
"""Faults after which it stops."""

Look = Callable[[], Mapping[str, float]]
"""What a server holds: file descriptors, threads, …"""


@dataclass
class Report:
    """What came of it."""

    seed: int
    sent: int = 0
    unanswered: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    held: list[Mapping[str, float]] = field(default_factory=list)
    """At the start and after each round."""

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        lines = [f"seed {self.seed}: {self.sent} requests: {statuses}, {self.unanswered} without an answer"]
        lines += [", ".join(f"{name} {value}" for name, value in held.items()) for held in self.held]
        return "\n".join([*lines, *self.faults])


class Fuzz:
    """Against the server at `base_url`, which serves `tests.fuzz.models`, but for the paths `without`."""

    def __init__(self, base_url: str, seed: int, look: Look = dict, without: Collection[str] = ()) -> None:
        self._url = base_url
        document = httpx.get(f"{base_url}/openapi.json", timeout=60).json()
        self.targets = [target for target in targets(document) if target.path not in without]
        self._valid, self._verdict = Valid(document), Verdict(document)
        self._look = look
        self.report = Report(seed)

    def request(self, name: str, number: int) -> Fuzzed:
        """One of the requests, made again."""
        (target,) = [target for target in self.targets if target.name == name]
        return make(target, self.report.seed, number, self._valid)

    async def run(self, requests: int) -> Report:
        """At least so many; fewer only if there are `ENOUGH` faults."""
        wires = [self._wire() for _ in range(CONNECTIONS)]
        before = {target.name: await ask_good(wires[0], target) for target in self.targets}
        self.report.held.append(self._look())
        planned = [(target, -(-share // ROUNDS)) for target, share in shares(self.targets, requests)]
        for turn in range(ROUNDS):
            for target, share in planned:
                await self._burst(wires, target, range(turn * share, (turn + 1) * share))
                difference = changed(before[target.name], await ask_good(wires[0], target), target.method)
                if difference:
                    self.report.faults.append(f"{target.name}, after numbers {turn * share} and on: {difference}")
                if len(self.report.faults) >= ENOUGH:
                    return self.report
            for wire in wires:
                await wire.close()
            await asyncio.sleep(0.5)
            self.report.held.append(self._look())
        return self.report

    def _wire(self) -> Wire:
        address = urlsplit(self._url)
        assert address.hostname is not None
        assert address.port is not None
        return Wire(address.hostname, address.port)

    async def _burst(self, wires: Sequence[Wire], target: Target, numbers: Iterable[int]) -> None:
        left = iter(numbers)

        async def work(wire: Wire) -> None:
            for number in left:
                request = make(target, self.report.seed, number, self._valid)
                await self._one(wire, request)

        await asyncio.gather(*(work(wire) for wire in wires))

    async def _one(self, wire: Wire, request: Fuzzed) -> None:
        self.report.sent += 1
        try:
            answer = await self.ask(wire, request)
        except asyncio.TimeoutError:
            self.report.faults.append(self._told(request, "no answer in time", None))
            return
        if answer is None:
            self.report.unanswered += 1
        else:
            self.report.statuses[answer.status] += 1
        faults = self._verdict.faults(request, answer)
        if faults:
            self.report.faults.append(self._told(request, "; ".join(faults), answer))

    async def ask(self, wire: Wire, request: Fuzzed) -> Answer | None:
        """Raises TimeoutError."""
        if request.broken:
            return await wire.ask_broken(request.data, request.half_closes)
        return await wire.ask(request.data, request.wants_head_only)

    async def replay(self, request: Fuzzed) -> str:
        """The request, its answer, and what is wrong with it."""
        wire = self._wire()
        answer = await self.ask(wire, request)
        await wire.close()
        return self._told(request, "; ".join(self._verdict.faults(request, answer)) or "no fault", answer, most=100_000)

    def _told(self, request: Fuzzed, fault: str, answer: Answer | None, most: int = 800) -> str:
        again = f"--seed {self.report.seed} --only {shlex.quote(request.target.name)} --number {request.number}"
        answered = "" if answer is None else f"{answer.status} {answer.headers} {answer.body[:most]!r}"
        return (
            f"{fault}\n  request ({', '.join(request.kinds)}): {request.data[:most]!r}\n  answer: {answered}\n"
            f"  again: python -m tests.fuzz {again}"
        )


async def ask_good(wire: Wire, target: Target) -> Answer | None:
    """The answer to a request that nothing was done to."""
    body = b"" if target.good is None else json.dumps(target.good).encode()
    head = f"{target.method} {target.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    return await wire.ask(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

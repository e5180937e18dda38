"""One model's way through the tiers: concurrent requests share one call to the tokenizer and one to the model."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.config import IngressSettings
from serve_app.errors import OverloadedError, ServeAppError, UnavailableError
from serve_app.ingress.gate import Gate, GateLimits, Group
from serve_app.metrics import IngressMetrics
from serve_app.types import (
    Chat,
    Features,
    ForwardCall,
    HeadArguments,
    Priority,
    Rows,
    TextInput,
    Timings,
    TokenBatch,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)

REPLICA_LOST = (RayError, RayServeException, ConnectionError)
"""What a call raises when its replica died or could not be reached; errors of a replica's code are RayTaskError."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of the tiers: texts to tokenize, the head to apply and what that needs to know."""

    tokenize: TokenizeRequest
    head: str
    priority: Priority = "interactive"
    arguments: HeadArguments | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One request on its way; `deadline` on time.monotonic's clock."""

    work: Work
    deadline: float
    group: Group


@dataclass(frozen=True, slots=True)
class Computed:
    """What the tiers made of one request, and what it cost; `timings.total_s` is not known here."""

    features: Features
    tokens: int
    truncated: int
    windows: int
    timings: Timings


Outcome: TypeAlias = Computed | ServeAppError


class Coalescer:
    """Everything that one ingress replica sends to one model's replicas. Belongs to one event loop."""

    def __init__(
        self, name: str, tokenizer: Any, model: Any, settings: IngressSettings, metrics: IngressMetrics
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._model = model
        self._metrics = metrics
        self._gate = Gate(_gate_limits(settings))
        # Decorated here and not on the class, where all models would share one queue. The gate decides which requests
        # go together and how many batches are under way; these bounds are therefore wide and the wait is zero.
        self._share = serve.batch(max_batch_size=100_000, batch_wait_timeout_s=0.0, max_concurrent_batches=100_000)(
            self._run
        )

    def reconfigure(self, settings: IngressSettings) -> None:
        self._gate.set_limits(_gate_limits(settings))

    async def compute(self, work: Work, timeout_s: float) -> Computed:
        """One request's features. Raises ServeAppError: this request's own failure, or that its batch was lost."""
        deadline = time.monotonic() + timeout_s
        async with self._gate.admitted(_characters(work.tokenize)) as group:
            outcome = await self._share(Item(work, deadline, group))
        if isinstance(outcome, ServeAppError):
            raise outcome
        return outcome  # type: ignore[no-any-return]  # serve.batch is untyped; _run returns only these two

    async def _run(self, items: list[Item]) -> list[Outcome]:
        """One batch: failures are returned per item, because an error raised here would fail every neighbour."""
        for item in items:
            self._gate.seal(item.group)
        self._metrics.coalesced_requests.observe(len(items), {"model": self._name})
        heads = sorted({item.work.head for item in items})
        members = [[item for item in items if item.work.head == head] for head in heads]
        answered = await asyncio.gather(*(self._run_head(*each) for each in zip(heads, members, strict=True)))
        outcome_of = {
            id(item): outcome
            for group, outcomes in zip(members, answered, strict=True)
            for item, outcome in zip(group, outcomes, strict=True)
        }
        return [outcome_of[id(item)] for item in items]

    async def _run_head(self, head: str, items: list[Item]) -> list[Outcome]:
        """Once, and once more for what a lost replica took with it: inference has no side effects."""
        outcomes = await self._try(head, items)
        lost = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, UnavailableError)]
        if lost:
            logger.warning("%d of %d requests for model %s are sent again", len(lost), len(items), self._name)
            self._metrics.retries.inc(1, {"model": self._name})
            for i, outcome in zip(lost, await self._try(head, [items[i] for i in lost]), strict=True):
                outcomes[i] = outcome
        return outcomes

    async def _try(self, head: str, items: list[Item]) -> list[Outcome]:
        """Errors of the whole batch become each item's; a bug, ours or of a replica's code, is raised."""
        try:
            return await self._through_the_tiers(head, items)
        except BackPressureError:
            return [OverloadedError("every replica's queue is full; try again later", retry_after_s=1.0)] * len(items)
        except ServeAppError as error:
            return [error] * len(items)
        except REPLICA_LOST as error:
            logger.warning("a replica of model %s was lost: %s", self._name, _in_short(error))
            return [UnavailableError("the replica that computed this request was lost", retry_after_s=1.0)] * len(items)

    async def _through_the_tiers(self, head: str, items: list[Item]) -> list[Outcome]:
        tokens: TokenBatch = await _call(self._tokenizer.tokenize, [item.work.tokenize for item in items])
        now = time.monotonic()
        call = ForwardCall(
            tokens=tokens.for_model(),
            head=head,
            time_left_s=tuple(item.deadline - now for item in items),
            priorities=tuple(item.work.priority for item in items),
            arguments=_arguments(items),
        )
        if len(tokens.failures) == len(items):
            return [tokens.failures[i] for i in range(len(items))]
        rows: Rows = await _call(self._model.forward, call)
        return [_outcome(i, tokens, rows) for i in range(len(items))]


async def _call(method: Any, argument: Any) -> Any:
    """A handle call; what user code raised on the other side is raised as it was."""
    try:
        return await method.remote(argument)
    except RayTaskError as error:
        raise error.cause from None


def _outcome(index: int, tokens: TokenBatch, rows: Rows) -> Outcome:
    failure = tokens.failures.get(index) or rows.failures.get(index)
    if failure is not None:
        return failure
    mine = tokens.of_request(index)
    return Computed(
        features=_features(mine, rows, tokens.sequences_of(index)),
        tokens=tokens.tokens_of(index),
        truncated=_cut_inputs(mine),
        windows=_extra_windows(mine),
        timings=Timings(
            tokenize_s=tokens.tokenize_s, queue_s=float(rows.queue_s[index]), forward_s=float(rows.forward_s[index])
        ),
    )


def _features(tokens: TokenBatch, rows: Rows, where: slice) -> Features:
    if rows.cu_rows is None:
        return Features(tokens, rows.values[where])
    cu_rows = rows.cu_rows[where.start : where.stop + 1]
    return Features(tokens, rows.values[cu_rows[0] : cu_rows[-1]], cu_rows - cu_rows[0])


def _cut_inputs(tokens: TokenBatch) -> int:
    if tokens.input_of is None:
        return int(tokens.truncated.sum())
    return len(set(tokens.input_of[tokens.truncated].tolist()))


def _extra_windows(tokens: TokenBatch) -> int:
    """Windows of the inputs that are read in more than one."""
    if tokens.input_of is None:
        return 0
    windows = np.bincount(tokens.input_of)
    return int(windows[windows > 1].sum())


def _arguments(items: list[Item]) -> tuple[HeadArguments | None, ...]:
    arguments = tuple(item.work.arguments for item in items)
    return arguments if any(one is not None for one in arguments) else ()


def _characters(request: TokenizeRequest) -> int:
    """A request's weight before it is tokenized: its characters, a token id counting as four."""
    return sum(map(_length, request.inputs))


def _length(value: TextInput) -> int:
    if isinstance(value, (str, Chat)):
        return len(value)
    return sum(len(part) if isinstance(part, str) else 4 for part in value)


def _gate_limits(settings: IngressSettings) -> GateLimits:
    return GateLimits(settings.max_concurrent_batches, settings.max_batch_requests, settings.max_batch_characters)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]

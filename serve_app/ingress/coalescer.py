"""One model's way through the tiers: concurrent requests share one call to the tokenizer and one to the model."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, TypeAlias

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.config import IngressSettings
from serve_app.errors import OverloadedError, ServeAppError, UnavailableError
from serve_app.ingress.gate import Gate, GateLimits, Group
from serve_app.metrics import IngressMetrics
from serve_app.types import FloatArray, ForwardCall, Priority, Rows, Timings, TokenBatch, TokenizeRequest

logger = logging.getLogger(__name__)

REPLICA_LOST = (RayError, RayServeException, ConnectionError)
"""What a call raises when its replica died or could not be reached; errors of a replica's code are RayTaskError."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request on its way; `deadline` on time.monotonic's clock."""

    tokenize: TokenizeRequest
    head: str
    priority: Priority
    deadline: float
    group: Group


@dataclass(frozen=True, slots=True)
class Computed:
    """One request's rows (n, d) float32 and what they cost; `timings.total_s` is not known here."""

    rows: FloatArray
    tokens: int
    truncated: int
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

    async def compute(self, request: TokenizeRequest, head: str, priority: Priority, timeout_s: float) -> Computed:
        """One request's rows. Raises ServeAppError: this request's own failure, or that its batch was lost."""
        deadline = time.monotonic() + timeout_s
        async with self._gate.admitted(_characters(request)) as group:
            outcome = await self._share(Item(request, head, priority, deadline, group))
        if isinstance(outcome, ServeAppError):
            raise outcome
        return outcome  # type: ignore[no-any-return]  # serve.batch is untyped; _run returns only these two

    async def _run(self, items: list[Item]) -> list[Outcome]:
        """One batch: failures are returned per item, because an error raised here would fail every neighbour."""
        for item in items:
            self._gate.seal(item.group)
        self._metrics.coalesced_requests.observe(len(items), {"model": self._name})
        heads = sorted({item.head for item in items})
        members = [[item for item in items if item.head == head] for head in heads]
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
        tokens: TokenBatch = await _call(self._tokenizer.tokenize, [item.tokenize for item in items])
        now = time.monotonic()
        call = ForwardCall(
            tokens=tokens,
            head=head,
            time_left_s=tuple(item.deadline - now for item in items),
            priorities=tuple(item.priority for item in items),
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
    where = tokens.sequences_of(index)
    return Computed(
        rows=rows.values[where],
        tokens=tokens.tokens_of(index),
        truncated=int(tokens.truncated[where].sum()),
        timings=Timings(
            tokenize_s=tokens.tokenize_s, queue_s=float(rows.queue_s[index]), forward_s=float(rows.forward_s[index])
        ),
    )


def _characters(request: TokenizeRequest) -> int:
    """A request's weight before it is tokenized: its characters, a token id counting as four."""
    return sum(
        len(value) if isinstance(value, str) else sum(len(v) if isinstance(v, str) else 4 for v in value)
        for value in request.inputs
    )


def _gate_limits(settings: IngressSettings) -> GateLimits:
    return GateLimits(settings.max_concurrent_batches, settings.max_batch_requests, settings.max_batch_characters)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]

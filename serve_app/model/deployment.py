"""The `<model>-model` deployment: what a model is for is known once its files are here, and decides how it answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve_app.cache.prewarm import Membership, ensure_local, replica_environment, version_here
from serve_app.config import CacheConfig, ModelConfig, ModelSettings, parse
from serve_app.errors import InvalidInputError
from serve_app.logs import show_log
from serve_app.metrics import ModelMetrics, ReplicaMetrics
from serve_app.model import memory
from serve_app.model.encoding import EncodingModel
from serve_app.model.generating import GeneratingModel
from serve_app.outputs import GeneratedPiece
from serve_app.tasks import probe
from serve_app.tasks.card import read_card
from serve_app.tasks.generation import GENERATING
from serve_app.tasks.registry import TASKS
from serve_app.timeouts import within
from serve_app.types import (
    Forget,
    ForwardCall,
    GenerationCall,
    ModelCard,
    ModelState,
    Rows,
    TokenBatch,
    VersionCall,
)

PROBE_TIMEOUT_S = 60.0
"""Far more than one forward pass takes, on a busy machine too."""


class ModelReplica:
    """Loads from this node's disk, offline, one model of either kind: that answers at once, or that generates.

    The first is asked by `forward` and `forget`, the second by `stream`.
    """

    async def __init__(self, model: ModelConfig, cache: CacheConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        show_log()
        os.environ.update(replica_environment(cache))
        memory.configure_allocator()
        memory.bound_kernel_cache()
        self._config = model
        self._metrics = ModelMetrics()
        self._replica_metrics = ReplicaMetrics()
        path = await ensure_local(model, cache)
        self._version = await version_here(path, model, cache)
        self._card = await asyncio.to_thread(read_card, path, model, self._version.revision)
        self._model = await asyncio.to_thread(self._load, path, self._card)
        self._model.start()
        self._membership = Membership(cache, model, "model", self._version)
        await self._prove(await self._membership.probe())
        await self._membership.enter()

    def _load(self, path: Path, card: ModelCard) -> EncodingModel | GeneratingModel:
        if card.task in GENERATING:
            return GeneratingModel(path, self._config, self._metrics)
        return EncodingModel(path, card, self._config, self._metrics)

    async def _prove(self, encoded: TokenBatch | None) -> None:
        """Compute what a tokenizer replica of this version has encoded. Raises the error that it ends in."""
        if encoded is not None:
            await within(self._compute(encoded), PROBE_TIMEOUT_S)

    async def _compute(self, encoded: TokenBatch) -> None:
        if isinstance(self._model, GeneratingModel):
            async for _ in self._model.stream(GenerationCall(encoded.input_ids, probe.ONE_TOKEN)):
                pass
            return
        arguments, head = probe.head_arguments(self._card.task), TASKS[self._card.task].head
        call = ForwardCall(encoded.for_model(), head, (None,), arguments=(arguments,) if arguments else ())
        rows = await self._model.engine.submit(call)
        if rows.failures:
            raise rows.failures[0]

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve tells every router of this replica."""
        return asdict(self._version)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply new settings from the next batch or step on. Raises ConfigError if they do not suit the model."""
        self._model.reconfigure(parse(ModelSettings, user_config, "user_config"))

    async def forward(self, call: ForwardCall) -> Rows:
        """Compute one coalesced batch; failures are per request, in the answer.

        Raises VersionGoneError, as the other methods do, if the call is for another version.
        """
        self._version.check(call.version)
        if isinstance(self._model, GeneratingModel):
            raise InvalidInputError(f"model {self._config.name} generates; it computes no batches")
        return await self._model.engine.submit(call)

    async def forget(self, forget: Forget) -> bool:
        """Never compute what still waits of these requests of a call; whether that call is under way here.

        With no requests it asks whether this replica can compute: raises UnavailableError if it must be replaced.
        """
        if not forget.requests:
            self._model.check()
        return isinstance(self._model, EncodingModel) and self._model.engine.forget(forget)

    async def stream(self, call: GenerationCall) -> AsyncGenerator[list[GeneratedPiece], None]:
        """The answer's pieces, all that are there in one message; raises ServeAppError, before the first or later."""
        self._version.check(call.version)
        if isinstance(self._model, EncodingModel):
            raise InvalidInputError(f"model {self._config.name} does not generate")
        async with aclosing(self._model.stream(call)) as lists:
            async for pieces in lists:
                yield pieces

    async def describe(self, call: VersionCall) -> ModelState:
        self._version.check(call.version)
        return self._model.describe()

    async def memory_summary(self, call: VersionCall) -> str:
        """The allocator's own report (CUDA), or this process's memory, as text for a person."""
        self._version.check(call.version)
        return self._model.memory_summary()

    async def check_health(self) -> None:
        """Raises if this replica must be replaced."""
        self._replica_metrics.look()
        self._model.check()

    def __del__(self) -> None:
        model = getattr(self, "_model", None)
        if model is not None:
            model.close()

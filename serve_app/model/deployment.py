"""The `<model>-model` deployment: an Engine behind a handle."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from serve_app.cache.prewarm import ensure_local, replica_environment
from serve_app.config import CacheConfig, ModelConfig, ModelSettings, parse
from serve_app.errors import ConfigError
from serve_app.metrics import ModelMetrics
from serve_app.model.engine import BatchReport, Engine
from serve_app.model.recovery import immediately
from serve_app.model.scheduler import Limits
from serve_app.types import ForwardCall, ModelState, Rows

EXIT_AFTER_S = 0.5
"""Time for the failed batch's answers to leave before a process with a broken device ends itself."""


class ModelReplica:
    """Loads from this node's disk, offline, and computes on one device thread; the event loop never does."""

    async def __init__(self, model: ModelConfig, cache: CacheConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        os.environ.update(replica_environment(cache))
        self._config = model
        self._settings = ModelSettings()
        self._metrics = ModelMetrics()
        path = await ensure_local(model, cache)
        await asyncio.to_thread(self._load, path)
        self._engine.start(asyncio.get_running_loop())

    def _load(self, path: Any) -> None:
        # torch and transformers take seconds to import: here, off the event loop, after the environment is set.
        from serve_app.model import loader, runner
        from serve_app.tasks.card import read_card
        from serve_app.tasks.heads import pooled

        card = read_card(path, self._config, path.name)
        self._max_input_tokens = card.max_input_tokens
        self._loaded = loader.load(path, self._config, card.max_input_tokens)
        self._runner = runner.Runner(self._loaded, pooled(card.pooling))
        self._runner.warm_up(self._settings.max_batch_tokens)
        self._engine = Engine(
            launch=lambda head, batch: immediately(self._runner.run)(batch),
            limits=_limits(self._settings),
            max_input_tokens=card.max_input_tokens,
            observe=self._observe,
            on_broken=lambda: threading.Timer(EXIT_AFTER_S, os._exit, [1]).start(),
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply new settings from the next batch on. Raises ConfigError if they do not suit the model."""
        settings = parse(ModelSettings, user_config, "user_config")
        if settings.max_batch_tokens < self._max_input_tokens:
            raise ConfigError(
                f"user_config.max_batch_tokens: {settings.max_batch_tokens} is less than the model's longest input, "
                f"{self._max_input_tokens} tokens; raise it, or lower max_input_tokens of model {self._config.name}"
            )
        self._settings = settings
        self._engine.set_limits(_limits(settings))

    async def forward(self, call: ForwardCall) -> Rows:
        """Compute one coalesced batch; failures are per request, in the answer."""
        return await self._engine.submit(call)

    async def describe(self) -> ModelState:
        return ModelState(
            dtype=str(self._loaded.dtype).removeprefix("torch."),
            device=str(self._loaded.device),
            attention=self._runner.mode,
            max_batch_tokens=self._engine.max_batch_tokens,
        )

    async def check_health(self) -> None:
        """Raises if this replica must be replaced."""
        self._engine.check()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()

    def _observe(self, report: BatchReport) -> None:
        tags = {"model": self._config.name}
        self._metrics.batch_tokens.observe(report.tokens, tags)
        self._metrics.batch_sequences.observe(report.sequences, tags)
        self._metrics.forward_seconds.observe(report.forward_s, tags)
        self._metrics.queued_tokens.set(report.queued_tokens, tags)
        if report.out_of_memory:
            self._metrics.out_of_memory.inc(report.out_of_memory, tags)
        if report.failures:
            self._metrics.failed_inputs.inc(report.failures, tags)


def _limits(settings: ModelSettings) -> Limits:
    return Limits(settings.max_batch_tokens, settings.max_batch_sequences, settings.max_queued_tokens)

"""The `<model>-model` deployment: an Engine behind a handle."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

from serve_app.cache.prewarm import ensure_local, replica_environment
from serve_app.config import CacheConfig, ModelConfig, ModelSettings, parse
from serve_app.errors import ConfigError
from serve_app.logs import show_log
from serve_app.metrics import ModelMetrics, ReplicaMetrics
from serve_app.model import memory
from serve_app.model.engine import BatchReport, Engine
from serve_app.model.scheduler import Limits
from serve_app.tasks.generation import GENERATING
from serve_app.types import Forget, ForwardCall, ModelState, Rows

EXIT_AFTER_S = 0.5
"""Time for the failed batch's answers to leave before a process with a broken device ends itself."""


class ModelReplica:
    """Loads from this node's disk, offline, and computes on one device thread; the event loop never does."""

    async def __init__(self, model: ModelConfig, cache: CacheConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        show_log()
        os.environ.update(replica_environment(cache))
        memory.configure_allocator()
        self._config = model
        self._metrics = ModelMetrics()
        self._replica_metrics = ReplicaMetrics()
        path = await ensure_local(model, cache)
        await asyncio.to_thread(self._load, path)
        self._engine.start(asyncio.get_running_loop())

    def _load(self, path: Path) -> None:
        # torch and transformers take seconds to import: here, off the event loop, after the environment is set.
        from serve_app.model.loader import load
        from serve_app.model.runner import Runner
        from serve_app.tasks.card import read_card

        card = read_card(path, self._config, path.name)
        if card.task in GENERATING:
            raise ConfigError(
                f"models.{self._config.name}.task: the model is for {card.task}, which could not be known before its "
                f"files were here; set task to {card.task}"
            )
        self._max_input_tokens = card.max_input_tokens
        memory.limit_share(self._config.memory_fraction)
        self._loaded = load(path, self._config, card.max_input_tokens)
        self._runner = Runner(self._loaded)
        self._runner.warm_up(self._default_batch_tokens)
        self._affordable_tokens = self._measure_memory()
        self._engine = Engine(
            launch=lambda head, work: self._runner.launch(head, work.tokens, work.arguments),
            limits=self._limits(ModelSettings()),
            max_input_tokens=card.max_input_tokens,
            depth=self._depth,
            observe=self._observe,
            on_broken=lambda: threading.Timer(EXIT_AFTER_S, os._exit, [1]).start(),
            on_idle=self._housekeeper(),
            on_abandoned=lambda tokens: self._metrics.abandoned_tokens.inc(tokens, {"model": self._config.name}),
        )

    @property
    def _on_cuda(self) -> bool:
        return bool(self._loaded.device.type == "cuda")

    @property
    def _depth(self) -> int:
        """Batches on the device at once: a GPU computes one while the host prepares the next."""
        return 2 if self._on_cuda else 1

    @property
    def _default_batch_tokens(self) -> int:
        most = memory.MOST_CUDA_TOKENS if self._on_cuda else memory.DEFAULT_CPU_TOKENS
        return max(most, self._max_input_tokens)

    def _measure_memory(self) -> int | None:
        """Tokens that this device's free memory carries in one batch; None on CPU."""
        if not self._on_cuda:
            return None
        cost = memory.measure_cuda(self._runner.run_random, self._loaded.device, self._max_input_tokens)
        free = memory.read_cuda(self._loaded.device)
        return memory.affordable_tokens(cost, free, self._config.memory_reserve, self._depth, self._max_input_tokens)

    def _housekeeper(self) -> Any:
        if not self._on_cuda:
            return lambda: None
        import torch

        return memory.Housekeeper(lambda: memory.read_cuda(self._loaded.device), torch.cuda.empty_cache).idle

    def _limits(self, settings: ModelSettings) -> Limits:
        tokens = settings.max_batch_tokens or self._default_batch_tokens
        if self._affordable_tokens is not None:
            tokens = min(tokens, self._affordable_tokens)
        return Limits(tokens, settings.max_batch_sequences, settings.max_queued_tokens)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply new settings from the next batch on. Raises ConfigError if they do not suit the model."""
        settings = parse(ModelSettings, user_config, "user_config")
        if settings.max_batch_tokens is not None and settings.max_batch_tokens < self._max_input_tokens:
            raise ConfigError(
                f"user_config.max_batch_tokens: {settings.max_batch_tokens} is less than the model's longest input, "
                f"{self._max_input_tokens} tokens; raise it, or lower max_input_tokens of model {self._config.name}"
            )
        self._engine.set_limits(self._limits(settings))

    async def forward(self, call: ForwardCall) -> Rows:
        """Compute one coalesced batch; failures are per request, in the answer."""
        return await self._engine.submit(call)

    async def forget(self, forget: Forget) -> bool:
        """Never compute what still waits of these requests of a call; whether that call is under way here."""
        return self._engine.forget(forget)

    async def describe(self) -> ModelState:
        return ModelState(
            dtype=self._loaded.precision.label,
            device=str(self._loaded.device),
            attention=self._runner.mode,
            max_batch_tokens=self._engine.max_batch_tokens,
            memory=memory.figures(self._loaded.device),
        )

    async def memory_summary(self) -> str:
        """The allocator's own report (CUDA), or this process's memory, as text for a person."""
        return memory.summary(self._loaded.device)

    async def check_health(self) -> None:
        """Raises if this replica must be replaced."""
        self._replica_metrics.look()
        self._engine.check()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()

    def _observe(self, report: BatchReport) -> None:
        tags = {"model": self._config.name}
        self._metrics.batch_tokens.observe(report.tokens, tags)
        if report.tokens:
            self._metrics.computed_tokens.inc(report.tokens, tags)
        self._metrics.batch_sequences.observe(report.sequences, tags)
        self._metrics.forward_seconds.observe(report.forward_s, tags)
        self._metrics.queued_tokens.set(report.queued_tokens, tags)
        if report.out_of_memory:
            self._metrics.out_of_memory.inc(report.out_of_memory, tags)
        if report.failures:
            self._metrics.failed_inputs.inc(report.failures, tags)
        if self._on_cuda:
            for kind, value in memory.figures(self._loaded.device).items():
                self._metrics.device_memory.set(value, {**tags, "kind": kind})

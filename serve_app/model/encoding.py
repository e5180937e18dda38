"""A model that answers at once, as a replica serves it: loaded, measured, and its Engine. Runs without Ray."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.config import ModelConfig, ModelSettings
from serve_app.errors import ConfigError
from serve_app.model import memory
from serve_app.model.engine import BatchReport, Engine
from serve_app.model.scheduler import Limits
from serve_app.model.watchdog import Watchdog
from serve_app.types import ModelCard, ModelState

if TYPE_CHECKING:
    from serve_app.metrics import ModelMetrics  # which needs Ray

EXIT_AFTER_S = 0.5
"""Time for the failed batch's answers to leave before a process with a broken device ends itself."""


def end_process() -> None:
    """For a replica whose device is broken: Serve starts another one."""
    threading.Timer(EXIT_AFTER_S, os._exit, [1]).start()


class EncodingModel:
    """Computes on one device thread; the event loop never does."""

    def __init__(self, path: Path, card: ModelCard, config: ModelConfig, metrics: ModelMetrics) -> None:
        """Load from local files, off the event loop, after the environment is set.

        Raises ConfigError or IncompleteModelError if the model cannot be served.
        """
        # torch and transformers take seconds to import.
        from serve_app.model.loader import load
        from serve_app.model.runner import Runner

        self._config, self._metrics = config, metrics
        self._max_input_tokens = card.max_input_tokens
        memory.limit_share(config.memory_fraction)
        self._loaded = load(path, config, card.max_input_tokens)
        self._runner = Runner(self._loaded)
        self._measured = self._measure_memory()
        settings = ModelSettings()
        limits = self._limits(settings)
        self._watchdog = Watchdog(settings.max_forward_s, self._runner.warm_up(limits.max_batch_tokens))
        self.engine = Engine(
            launch=lambda head, work: self._runner.launch(head, work.tokens, work.arguments),
            limits=limits,
            max_input_tokens=card.max_input_tokens,
            depth=self._depth,
            observe=self._observe,
            on_broken=end_process,
            on_idle=memory.housekeeper(self._loaded.device).idle,
            probe=self._runner.probe,
            watchdog=self._watchdog,
            on_abandoned=lambda tokens: metrics.abandoned_tokens.inc(tokens, {"model": config.name}),
        )

    def start(self) -> None:
        """Start computing; call it on the event loop that `engine` is used on."""
        self.engine.start(asyncio.get_running_loop())

    def close(self) -> None:
        self.engine.close()

    def check(self) -> None:
        """Raises UnavailableError if this replica must be replaced."""
        self.engine.check()

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

    def _measure_memory(self) -> tuple[memory.BytesPerBatch, memory.DeviceMemory] | None:
        """What a batch costs, and the device's memory before there is load; None on CPU. All limits follow from it."""
        if not self._on_cuda:
            return None
        cost = memory.measure_cuda(self._runner.run_random, self._loaded.device, self._max_input_tokens)
        return cost, memory.read_cuda(self._loaded.device)

    def _limits(self, settings: ModelSettings) -> Limits:
        tokens, sequences = settings.max_batch_tokens or self._default_batch_tokens, settings.max_batch_sequences
        if self._measured is not None:
            reserve, longest = self._config.memory_reserve, self._max_input_tokens
            affordable, sequences = memory.affordable_batch(*self._measured, reserve, longest, sequences)
            tokens = min(tokens, affordable)
        return Limits(tokens, sequences, settings.max_queued_tokens)

    def reconfigure(self, settings: ModelSettings) -> None:
        """Apply new settings from the next batch on. Raises ConfigError if they do not suit the model."""
        if settings.max_batch_tokens is not None and settings.max_batch_tokens < self._max_input_tokens:
            raise ConfigError(
                f"user_config.max_batch_tokens: {settings.max_batch_tokens} is less than the model's longest input, "
                f"{self._max_input_tokens} tokens; raise it, or lower max_input_tokens of model {self._config.name}"
            )
        self._watchdog.max_s = settings.max_forward_s
        self.engine.set_limits(self._limits(settings))

    def describe(self) -> ModelState:
        return ModelState(
            dtype=self._loaded.precision.label,
            device=str(self._loaded.device),
            attention=self._runner.mode,
            max_batch_tokens=self.engine.max_batch_tokens,
            memory=memory.figures(self._loaded.device),
        )

    def memory_summary(self) -> str:
        """The allocator's own report (CUDA), or this process's memory, as text for a person."""
        return memory.summary(self._loaded.device)

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

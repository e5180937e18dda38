"""A model that generates, as a replica serves it: loaded, and its StepEngine. Runs without Ray."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.config import ModelConfig, ModelSettings
from serve_app.model import memory
from serve_app.model.encoding import end_process
from serve_app.model.watchdog import Watchdog
from serve_app.outputs import GeneratedPiece
from serve_app.types import GenerationCall, ModelState

if TYPE_CHECKING:
    from serve_app.metrics import ModelMetrics  # which needs Ray


class GeneratingModel:
    """Computes on its device thread; the event loop never does."""

    def __init__(self, path: Path, config: ModelConfig, metrics: ModelMetrics) -> None:
        """Load from local files, off the event loop, after the environment is set.

        Raises ConfigError or IncompleteModelError if the model cannot be served.
        """
        # torch and transformers take seconds to import.
        from serve_app.model.generation.decoding import Decoding
        from serve_app.model.generation.engine import StepEngine
        from serve_app.model.generation.loader import affordable_kv_tokens, load
        from serve_app.model.host import govern_threads, keep_freed_memory

        self._config, self._metrics = config, metrics
        memory.limit_share(config.memory_fraction)
        govern_threads(config.num_threads)
        self._loaded = loaded = load(path, config)
        keep_freed_memory()
        self._watchdog = Watchdog(ModelSettings().max_forward_s)
        self._affordable_kv_tokens = affordable_kv_tokens(loaded, config.memory_reserve)
        self._engine = StepEngine(
            Decoding(loaded.model, loaded.device),
            loaded.decoder,
            self._limits(ModelSettings()),
            loaded.window,
            special=loaded.special,
            computing=lambda: loaded.precision.computing(loaded.device),
            prepare_thread=lambda: govern_threads(config.num_threads),
            observe=self._observe,
            on_broken=end_process,
            on_idle=memory.housekeeper(loaded.device).idle,
            watchdog=self._watchdog,
            by_steps=loaded.by_steps,
        )

    def start(self) -> None:
        """Start computing; call it on the event loop that `stream` is used on."""
        self._engine.start()

    def close(self) -> None:
        self._engine.close()

    def check(self) -> None:
        """Raises UnavailableError if this replica must be replaced."""
        self._engine.check()

    def _limits(self, settings: ModelSettings) -> Any:
        from serve_app.model.generation.engine import GenerationLimits
        from serve_app.model.generation.loader import most_kv_tokens

        sequences = settings.max_generated_sequences
        default = min(self._affordable_kv_tokens, most_kv_tokens(self._loaded, sequences))
        return GenerationLimits(
            max_kv_tokens=settings.max_kv_tokens or default,
            max_sequences=sequences,
            max_queued_tokens=settings.max_queued_tokens,
            prefill_tokens=settings.prefill_tokens,
        )

    def reconfigure(self, settings: ModelSettings) -> None:
        """Apply new settings from the next step on."""
        self._watchdog.max_s = settings.max_forward_s
        self._engine.limits = self._limits(settings)

    async def stream(self, call: GenerationCall) -> AsyncGenerator[list[GeneratedPiece], None]:
        """The answer's pieces, all that are there in one message; raises ServeAppError, before the first or later."""
        from serve_app.model.generation.job import GenerationJob

        deadline = None if call.time_left_s is None else time.monotonic() + call.time_left_s
        job = GenerationJob(tuple(call.input_ids.tolist()), call.options, deadline, call.priority)
        async with aclosing(self._engine.generate_lists(job)) as lists:
            async for pieces in lists:
                yield pieces

    def describe(self) -> ModelState:
        return ModelState(
            dtype=self._loaded.precision.label,
            device=str(self._loaded.device),
            attention=f"generating {self._loaded.mode}",
            max_batch_tokens=self._engine.limits.max_kv_tokens,
            memory=memory.figures(self._loaded.device),
        )

    def memory_summary(self) -> str:
        """The allocator's own report (CUDA), or this process's memory, as text for a person."""
        return memory.summary(self._loaded.device)

    def _observe(self, report: Any) -> None:
        tags = {"model": self._config.name}
        self._metrics.batch_sequences.observe(report.sequences, tags)
        tokens = report.rows + report.prefilled_tokens
        self._metrics.batch_tokens.observe(tokens, tags)
        self._metrics.computed_tokens.inc(tokens, tags)
        self._metrics.forward_seconds.observe(report.step_s, tags)
        self._metrics.queued_tokens.set(report.queued_tokens, tags)

"""Every metric of the application: name, unit, labels and buckets stand here and nowhere else.

Exported by Ray with the prefix `ray_`; Serve adds the labels `application`, `deployment` and `replica`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
BATCH_TOKENS = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
BATCH_SEQUENCES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


@dataclass(frozen=True, slots=True)
class IngressMetrics:
    """What the edge sees. `code` is "ok" or the code of the error that was answered."""

    requests: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_requests", "Requests answered, by model, task and outcome.", ("model", "task", "code")
        )
    )
    stage_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "serve_app_stage_seconds",
            "Seconds of a request in each stage: tokenize, queue (in the model replica), forward, total.",
            SECONDS,
            ("model", "stage"),
        )
    )
    tokens: Counter = field(
        default_factory=lambda: Counter("serve_app_tokens", "Tokens computed for answered requests.", ("model",))
    )
    truncated_inputs: Counter = field(
        default_factory=lambda: Counter("serve_app_truncated_inputs", "Inputs cut to the model's limit.", ("model",))
    )
    coalesced_requests: Histogram = field(
        default_factory=lambda: Histogram(
            "serve_app_coalesced_requests",
            "Requests that shared one call to the tokenizer and model tiers.",
            BATCH_SEQUENCES,
            ("model",),
        )
    )
    retries: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_retries", "Requests sent again after a replica was lost.", ("model",)
        )
    )
    abandoned_requests: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_abandoned_requests",
            "Requests whose client left or whose time ran out before their answer, by the stage they had reached: "
            "waiting (in the ingress), tokenize, model.",
            ("model", "stage"),
        )
    )


@dataclass(frozen=True, slots=True)
class ReplicaMetrics:
    """What every replica says of itself at each of Serve's health checks."""

    event_loop_tasks: Gauge = field(
        default_factory=lambda: Gauge("serve_app_event_loop_tasks", "asyncio tasks alive in a replica's event loop.")
    )

    def look(self) -> None:
        """Call on the replica's event loop."""
        self.event_loop_tasks.set(len(asyncio.all_tasks()))


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """What a model replica sees."""

    batch_tokens: Histogram = field(
        default_factory=lambda: Histogram(
            "serve_app_batch_tokens", "Real tokens in one forward pass.", BATCH_TOKENS, ("model",)
        )
    )
    batch_sequences: Histogram = field(
        default_factory=lambda: Histogram(
            "serve_app_batch_sequences", "Sequences in one forward pass.", BATCH_SEQUENCES, ("model",)
        )
    )
    forward_seconds: Histogram = field(
        default_factory=lambda: Histogram("serve_app_forward_seconds", "Seconds of one forward.", SECONDS, ("model",))
    )
    queued_tokens: Gauge = field(
        default_factory=lambda: Gauge("serve_app_queued_tokens", "Tokens waiting in a model replica.", ("model",))
    )
    out_of_memory: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_out_of_memory", "Forward passes that ran out of memory and were split.", ("model",)
        )
    )
    failed_inputs: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_failed_inputs", "Inputs that failed alone in the model (errors, NaN, no memory).", ("model",)
        )
    )
    computed_tokens: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_computed_tokens", "Real tokens of all forward passes, whoever got an answer.", ("model",)
        )
    )
    abandoned_tokens: Counter = field(
        default_factory=lambda: Counter(
            "serve_app_abandoned_tokens",
            "Tokens dropped from a model replica's queue, never computed, because nobody waited for them any more.",
            ("model",),
        )
    )
    device_memory: Gauge = field(
        default_factory=lambda: Gauge(
            "serve_app_device_memory",
            "Memory of a CUDA device as its replica sees it: bytes by kind (allocated_bytes, reserved_bytes, ...), "
            "counts (alloc_retries, ooms), and the shares fragmentation and slack.",
            ("model", "kind"),
        )
    )


@dataclass(frozen=True, slots=True)
class CacheMetrics:
    """What the warmer sees of each model on each node (`node` is its address)."""

    bytes_here: Gauge = field(
        default_factory=lambda: Gauge(
            "serve_app_cache_bytes", "Bytes of a model that are on a node's disk.", ("model", "node")
        )
    )
    bytes_total: Gauge = field(
        default_factory=lambda: Gauge("serve_app_cache_total_bytes", "Bytes a model has in all.", ("model", "node"))
    )
    phase: Gauge = field(
        default_factory=lambda: Gauge(
            "serve_app_cache_phase",
            "1 for the phase a model is in on a node: pending, downloading, verifying, ready, error; 0 for the others.",
            ("model", "node", "phase"),
        )
    )

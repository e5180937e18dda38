"""What metrics tell of a request when it leaves, whatever protocol it came by and however it ended."""

from __future__ import annotations

from serve_app.ingress.visit import Visit
from serve_app.metrics import IngressMetrics


def count(visit: Visit, metrics: IngressMetrics) -> None:
    """Once for each request. No label is a client's: models are those that are served, codes and tasks our own."""
    model = {"model": visit.model}
    metrics.requests.inc(1, {**model, "task": visit.task, "code": visit.outcome})
    if visit.usage.tokens:
        metrics.tokens.inc(visit.usage.tokens, model)
    truncated = visit.truncated if visit.answer is None else visit.answer.truncated
    if truncated:
        metrics.truncated_inputs.inc(truncated, model)
    if visit.answer is not None:
        times = visit.answer.timings
        for stage in ("tokenize", "queue", "forward", "total"):
            metrics.stage_seconds.observe(getattr(times, f"{stage}_s"), {**model, "stage": stage})

"""Device memory: how the allocator is set, what it says of itself, and how many tokens fit.

On CPU there is nothing to budget here: activations of one batch are bounded by the configured token budget.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from serve_app.errors import ConfigError

ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE_SEGMENTS = "expandable_segments:True"

DEFAULT_CPU_TOKENS = 1024
MOST_CUDA_TOKENS = 32_768
"""Beyond this a batch only adds latency: kernels are long enough to hide every launch."""


def configure_allocator(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let segments grow instead of fragmenting, unless the operator configured the allocator.

    To be called before torch first touches the device. Raises ConfigError if both of torch's variables are set, since
    which of the two wins depends on torch's version.
    """
    if ALLOCATOR in environment and OLD_ALLOCATOR in environment:
        raise ConfigError(f"both {ALLOCATOR} and {OLD_ALLOCATOR} are set; keep the first only")
    if OLD_ALLOCATOR not in environment:
        environment.setdefault(ALLOCATOR, EXPANDABLE_SEGMENTS)


def limit_share(fraction: float | None) -> None:
    """Let this process have no more than that share of the current CUDA device; nothing where there is none."""
    import torch

    if fraction is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(fraction)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What torch.cuda.memory_stats() and mem_get_info() say; bytes, and counts since the process began."""

    allocated_bytes: int
    reserved_bytes: int
    active_bytes: int
    inactive_split_bytes: int
    requested_bytes: int
    peak_allocated_bytes: int
    free_bytes: int
    total_bytes: int
    alloc_retries: int
    ooms: int

    @property
    def fragmentation(self) -> float:
        """Share of reserved memory in pieces too scattered to give back, 0 to 1."""
        return self.inactive_split_bytes / self.reserved_bytes if self.reserved_bytes else 0.0

    @property
    def slack(self) -> float:
        """Share of reserved memory that no tensor uses, 0 to 1."""
        return (self.reserved_bytes - self.allocated_bytes) / self.reserved_bytes if self.reserved_bytes else 0.0

    @property
    def available_bytes(self) -> int:
        """What a new batch can have: free on the device, and reserved by us but unused."""
        return self.free_bytes + self.reserved_bytes - self.allocated_bytes

    def within(self, limit_bytes: int) -> DeviceMemory:
        """The same for a process that may reserve so much of the device."""
        free_bytes = max(0, min(self.free_bytes, limit_bytes - self.reserved_bytes))
        return replace(self, free_bytes=free_bytes, total_bytes=min(self.total_bytes, limit_bytes))

    def figures(self) -> dict[str, float]:
        """For metrics and `/info`."""
        return {
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "active_bytes": self.active_bytes,
            "inactive_split_bytes": self.inactive_split_bytes,
            "requested_bytes": self.requested_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "free_bytes": self.free_bytes,
            "total_bytes": self.total_bytes,
            "alloc_retries": self.alloc_retries,
            "ooms": self.ooms,
            "fragmentation": round(self.fragmentation, 4),
            "slack": round(self.slack, 4),
        }


def from_stats(stats: Mapping[str, Any], free_bytes: int, total_bytes: int) -> DeviceMemory:
    """`stats` as torch.cuda.memory_stats() returns it; empty before the first allocation."""

    def current(name: str, which: str = "current") -> int:
        return int(stats.get(f"{name}.all.{which}", 0))

    return DeviceMemory(
        allocated_bytes=current("allocated_bytes"),
        reserved_bytes=current("reserved_bytes"),
        active_bytes=current("active_bytes"),
        inactive_split_bytes=current("inactive_split_bytes"),
        requested_bytes=current("requested_bytes"),
        peak_allocated_bytes=current("allocated_bytes", "peak"),
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        alloc_retries=int(stats.get("num_alloc_retries", 0)),
        ooms=int(stats.get("num_ooms", 0)),
    )


def read_cuda(device: Any) -> DeviceMemory:
    """The memory of one CUDA device as this process sees it: of a share of it where `limit_share` set one."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return from_stats(torch.cuda.memory_stats(device), free_bytes, total_bytes).within(int(share * total_bytes))


def process_figures() -> dict[str, float]:
    """The same for a CPU replica: this process's memory, and what the machine has left."""
    import psutil

    memory = psutil.Process().memory_info()
    return {"rss_bytes": memory.rss, "available_bytes": psutil.virtual_memory().available}


def figures(device: Any) -> dict[str, float]:
    """What a replica on this torch.device tells of its memory, by name."""
    return read_cuda(device).figures() if device.type == "cuda" else process_figures()


def summary(device: Any) -> str:
    """The allocator's own report (CUDA), or this process's memory, as text for a person."""
    if device.type != "cuda":
        return "\n".join(f"{name} {value:,.0f}" for name, value in process_figures().items()) + "\n"
    import torch

    return str(torch.cuda.memory_summary(device))


@dataclass(frozen=True, slots=True)
class BytesPerBatch:
    """Peak bytes of one forward pass beyond the weights: `fixed + per_token * tokens`."""

    fixed: float
    per_token: float

    def of(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def tokens_in(self, budget_bytes: float) -> int:
        """The largest batch within a budget; 0 if none fits."""
        return max(0, int((budget_bytes - self.fixed) / self.per_token))


def fit(tokens: Sequence[int], peak_bytes: Sequence[int]) -> BytesPerBatch:
    """The line through measured peaks that none of them exceeds: least squares, then raised to the worst of them.

    Needs two batches of different size; raises ValueError otherwise. `per_token` is at least one byte.
    """
    if len(set(tokens)) < 2:
        raise ValueError("measure at least two batches of different size")
    per_token, fixed = np.polyfit(np.asarray(tokens, float), np.asarray(peak_bytes, float), 1)
    per_token = max(float(per_token), 1.0)
    above = max(peak - (fixed + per_token * n) for n, peak in zip(tokens, peak_bytes, strict=True))
    return BytesPerBatch(max(0.0, float(fixed) + max(0.0, above)), per_token)


def calibrate(
    forward: Callable[[int], object],
    sizes: Sequence[int],
    reset_peak: Callable[[], None],
    read: Callable[[], DeviceMemory],
) -> BytesPerBatch:
    """Run `forward(tokens)` for each size and fit what it needed at its peak beyond what lay there before.

    `sizes` ascend; the first that runs out of memory is the last tried. Raises ConfigError if fewer than two fit.
    """
    import torch

    peaks: list[int] = []
    for tokens in sizes:
        before = read().allocated_bytes
        reset_peak()
        try:
            forward(tokens)
        except torch.OutOfMemoryError:
            break
        peaks.append(read().peak_allocated_bytes - before)
    if len(peaks) < 2:
        raise ConfigError(
            f"the device's free memory does not carry a batch of {sizes[len(peaks)]} tokens; lower max_input_tokens, "
            "raise memory_fraction, or use a larger device"
        )
    return fit(sizes[: len(peaks)], peaks)


def affordable_tokens(cost: BytesPerBatch, memory: DeviceMemory, reserve: float, depth: int, longest_input: int) -> int:
    """The token budget that free memory carries: `depth` batches at once, `reserve` (0 to 1) of the device kept free.

    Raises ConfigError if not even the longest input fits, rather than starting a replica that must fail.
    """
    budget_bytes = (memory.available_bytes - reserve * memory.total_bytes) / depth
    tokens = cost.tokens_in(budget_bytes)
    if tokens < longest_input:
        gib = 1 << 30
        raise ConfigError(
            f"the device has {memory.available_bytes / gib:.2f} GiB for batches and {reserve:.0%} of it is kept in "
            f"reserve, but the model's longest input ({longest_input} tokens) needs {cost.of(longest_input) / gib:.2f} "
            "GiB; lower max_input_tokens or memory_reserve, or use a larger device"
        )
    return tokens


def measure_cuda(forward: Callable[[int], object], device: Any, longest_input: int) -> BytesPerBatch:
    """`calibrate` on a CUDA device, with batches of one to eight times the longest input."""
    import torch

    return calibrate(
        forward,
        [longest_input * times for times in (1, 2, 4, 8)],
        lambda: torch.cuda.reset_peak_memory_stats(device),
        lambda: read_cuda(device),
    )


class Housekeeper:
    """Gives unused memory back when much of it is slack and the device has nothing to do, and not often.

    `empty_cache` while requests run costs more than it gives: the next batch allocates again, and synchronizes.
    """

    def __init__(
        self,
        read: Callable[[], DeviceMemory],
        empty_cache: Callable[[], None],
        slack_above: float = 0.4,
        at_most_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._empty_cache, self._clock = read, empty_cache, clock
        self._slack_above, self._at_most_every_s = slack_above, at_most_every_s
        self._last = -float("inf")

    def idle(self) -> bool:
        """To be called while the device has nothing to do. True if memory was given back."""
        now = self._clock()
        if now - self._last < self._at_most_every_s:
            return False
        self._last = now
        if self._read().slack <= self._slack_above:
            return False
        self._empty_cache()
        return True

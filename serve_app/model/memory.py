"""Device memory: how the allocator is set, what it says of itself, and how many tokens fit.

On CPU there is no budget to find here: activations of one batch are bounded by the configured token budget.
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

KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KERNELS = "32"
"""How many compiled kernels oneDNN keeps, of up to 3 MB each; by itself it keeps 1,024. One forward needs 3 to 18, and
compiles as many as are not kept, so fewer would be compiled again for each layer."""

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


def bound_kernel_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let oneDNN keep fewer compiled kernels, unless the operator has said how many.

    To be called before anything is computed: oneDNN looks once, at its first kernel.
    """
    environment.setdefault(KERNEL_CACHE, KERNELS)


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
    """The same for a CPU replica: this process's memory, and what the machine and its cgroups leave."""
    import psutil

    from serve_app.model.host import available_memory_bytes

    return {"rss_bytes": psutil.Process().memory_info().rss, "available_bytes": available_memory_bytes()}


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
    """Peak bytes of one forward pass beyond the weights: `fixed + per_token * tokens + per_sequence * sequences`."""

    fixed: float
    per_token: float
    per_sequence: float = 0.0

    def of(self, tokens: int, sequences: int = 1) -> float:
        return self.fixed + self.per_token * tokens + self.per_sequence * sequences

    def tokens_in(self, budget_bytes: float, sequences: int = 1) -> int:
        """The most tokens of a batch of so many sequences within a budget; 0 if none fits."""
        return max(0, int((budget_bytes - self.of(0, sequences)) / self.per_token))


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


_LONG_SEQUENCES = (1, 2, 4, 8)
_SHORT_SEQUENCES = (32, 64, 512)
"""How many sequences the measured batches have: of the longest input, whose attention costs most a token, and of one
token, which show what each sequence costs: with `splade` a row over the vocabulary, far more than its tokens."""


def calibrate(
    forward: Callable[[list[int]], object],
    longest_input: int,
    reset_peak: Callable[[], None],
    read: Callable[[], DeviceMemory],
) -> BytesPerBatch:
    """Run `forward` on sequences of given lengths, and find what it needed at its peak beyond what lay there before.

    The first batch of either kind that runs out of memory is the last one tried. Raises ConfigError if fewer than two
    of a kind fit.
    """
    long = [[longest_input] * sequences for sequences in _LONG_SEQUENCES]
    peaks = _peaks(forward, long, 2, reset_peak, read)
    cost = fit([sum(lengths) for lengths in long[: len(peaks)]], peaks)
    short = [[1] * sequences for sequences in _SHORT_SEQUENCES]
    return replace(cost, per_sequence=_per_sequence(cost, short, _peaks(forward, short, 2, reset_peak, read)))


def _per_sequence(cost: BytesPerBatch, batches: Sequence[list[int]], peaks: Sequence[int]) -> float:
    """What each sequence costs beside its tokens, so that neither a measured batch nor a larger one costs more."""
    counts = [len(lengths) for lengths in batches[: len(peaks)]]
    beyond = [(peak - cost.of(sum(lengths), 0)) / len(lengths) for lengths, peak in zip(batches, peaks, strict=False)]
    return max(0.0, fit(counts, peaks).per_token - cost.per_token, *beyond)


def _peaks(
    forward: Callable[[list[int]], object],
    batches: Sequence[list[int]],
    fewest: int,
    reset_peak: Callable[[], None],
    read: Callable[[], DeviceMemory],
) -> list[int]:
    """Peak bytes of the batches, up to the first that runs out of memory. Raises ConfigError if these are too few."""
    import torch

    peaks: list[int] = []
    for lengths in batches:
        before = read().allocated_bytes
        reset_peak()
        try:
            forward(lengths)
        except torch.OutOfMemoryError:
            break
        peaks.append(read().peak_allocated_bytes - before)
    if len(peaks) < fewest:
        failed = batches[len(peaks)]
        raise ConfigError(
            f"the device's free memory does not carry a batch of {sum(failed)} tokens in {len(failed)} sequences; "
            "lower max_input_tokens, raise memory_fraction, or use a larger device"
        )
    return peaks


def affordable_batch(
    cost: BytesPerBatch, memory: DeviceMemory, reserve: float, longest_input: int, max_sequences: int
) -> tuple[int, int]:
    """The most tokens, and the most sequences up to `max_sequences`, that one batch may have.

    All memory that is available is for one batch, but for `reserve` (0 to 1) of the device: where the next one is
    launched before the last is done, they share a stream, so the allocator gives the second what the first has let go
    of on the host, though its kernels still run. Sequences get at most half of what the longest input leaves.

    Raises ConfigError if not even the longest input fits, rather than starting a replica that must fail.
    """
    budget_bytes = memory.available_bytes - reserve * memory.total_bytes
    spare_bytes = budget_bytes - cost.of(longest_input)
    if spare_bytes < 0:
        gib = 1 << 30
        raise ConfigError(
            f"the device has {memory.available_bytes / gib:.2f} GiB for batches and {reserve:.0%} of it is kept in "
            f"reserve, but the model's longest input ({longest_input} tokens) needs {cost.of(longest_input) / gib:.2f} "
            "GiB; lower max_input_tokens or memory_reserve, or use a larger device"
        )
    further = spare_bytes / 2 / cost.per_sequence if cost.per_sequence else max_sequences
    sequences = min(max_sequences, 1 + int(further))
    return max(longest_input, cost.tokens_in(budget_bytes, sequences)), sequences


def measure_cuda(forward: Callable[[list[int]], object], device: Any, longest_input: int) -> BytesPerBatch:
    """`calibrate` on a CUDA device."""
    import torch

    return calibrate(
        forward,
        longest_input,
        lambda: torch.cuda.reset_peak_memory_stats(device),
        lambda: read_cuda(device),
    )


class Housekeeper:
    """Gives unused memory back when there is much of it and the device has nothing to do, and not often.

    Giving back while requests run costs more than it gives: the next batch takes the same memory again, which on CUDA
    waits for the device and on CPU faults every page in.
    """

    def __init__(
        self,
        much_is_unused: Callable[[], bool],
        give_back: Callable[[], None],
        at_most_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._much_is_unused, self._give_back, self._clock = much_is_unused, give_back, clock
        self._at_most_every_s = at_most_every_s
        self._last = -float("inf")

    def idle(self) -> bool:
        """To be called while the device has nothing to do. True if memory was given back."""
        now = self._clock()
        if now - self._last < self._at_most_every_s:
            return False
        self._last = now
        if not self._much_is_unused():
            return False
        self._give_back()
        return True


class HostHeap:
    """How much this process has grown since freed memory was last given back.

    That glibc has much free memory cannot be asked: it goes on counting pages as free that it has given back.
    """

    MUCH_BYTES = 64 << 20

    def __init__(self, resident_bytes: Callable[[], int], give_back: Callable[[], None]) -> None:
        self._resident_bytes, self._trim = resident_bytes, give_back
        self._least = 0

    def much_is_unused(self) -> bool:
        """True at first, when what loading and warming up have freed is still here."""
        return self._resident_bytes() - self._least > self.MUCH_BYTES

    def give_back(self) -> None:
        self._trim()
        self._least = self._resident_bytes()


CUDA_SLACK = 0.4
"""Share of reserved memory that may be unused on an idle CUDA device."""


def housekeeper(device: Any) -> Housekeeper:
    """The one for a replica on this torch.device."""
    import psutil
    import torch

    from serve_app.model.host import give_back_freed_memory

    if device.type == "cuda":
        return Housekeeper(lambda: read_cuda(device).slack > CUDA_SLACK, torch.cuda.empty_cache)
    process = psutil.Process()
    heap = HostHeap(lambda: int(process.memory_info().rss), give_back_freed_memory)
    return Housekeeper(heap.much_is_unused, heap.give_back)

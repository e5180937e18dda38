"""Computes one batch on the device: the model once over all its tokens, then the task's head."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from serve_app.model.acceptance import accept, random_batch
from serve_app.model.bucketing import IndexArray
from serve_app.model.host import govern_threads, keep_freed_memory
from serve_app.model.loader import LoadedModel
from serve_app.tasks.heads import Head
from serve_app.types import FloatArray, TokenBatch


class Runner:
    """One model and one head on one device. Not thread-safe: one device thread calls `run`."""

    def __init__(self, loaded: LoadedModel, head: Head) -> None:
        self._loaded = loaded
        self._head = head
        self._thread: int | None = None
        self._govern_threads()
        accepted = accept(loaded)
        self._forward, self.mode = accepted.forward, accepted.mode
        if loaded.device.type == "cpu":
            keep_freed_memory()

    def run(self, batch: TokenBatch) -> FloatArray:
        """The head's rows (n, d) float32 for the n sequences of `batch`, in its order.

        Raises what torch raises: torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError.
        """
        return self.launch(batch)()

    def launch(self, batch: TokenBatch) -> Callable[[], FloatArray]:
        """Start the forward and the copy of its rows to the host; what is returned waits for them.

        On CUDA nothing here waits for the device, so that the next batch can be launched behind it. On CPU the rows
        are there at once. Both steps raise what `run` raises.
        """
        self._govern_threads()
        with self._loaded.precision.computing(self._loaded.device):
            parts = [(part.rows, self._head(part.hidden, part.cu_seqlens)) for part in self._forward(batch)]
            order = np.concatenate([index for index, _ in parts])
            arrived = _to_host(torch.cat([rows for _, rows in parts]).float())
        return lambda: _in_order(arrived(), order)

    def run_random(self, tokens: int) -> FloatArray:
        """`run` with random sequences of the longest length that fill `tokens`, to measure what a batch costs."""
        longest = self._loaded.max_input_tokens
        lengths = [longest] * (tokens // longest) + [tokens % longest] * bool(tokens % longest)
        return self.run(random_batch(self._loaded, lengths))

    def warm_up(self, max_batch_tokens: int) -> None:
        """Run batches over the range of shapes, so that no request pays for first-time work."""
        for lengths in warm_up_batches(self._loaded.max_input_tokens, max_batch_tokens, self._loaded.device.type):
            self.run(random_batch(self._loaded, lengths))

    def _govern_threads(self) -> None:
        """Give this thread its share of the cores. OpenMP keeps the number per calling thread."""
        if threading.get_ident() != self._thread:
            govern_threads(self._loaded.num_threads)
            self._thread = threading.get_ident()


def _to_host(values: Tensor) -> Callable[[], FloatArray]:
    """Copy to pinned memory behind the kernels that make the values; what is returned waits for the copy."""
    if not values.is_cuda:
        ready: FloatArray = values.numpy()
        return lambda: ready
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> FloatArray:
        copied.synchronize()
        rows: FloatArray = host.numpy()
        return rows

    return arrived


def _in_order(values: FloatArray, order: IndexArray) -> FloatArray:
    out = np.empty_like(values)
    out[order] = values
    return out


def warm_up_batches(max_input_tokens: int, max_batch_tokens: int, device_type: str) -> list[list[int]]:
    """Lengths of the batches to warm up with: one full mixed batch first, which takes the most memory, then singles.

    A GPU picks kernels by shape, so there each length has a full batch of its own as well.
    """
    lengths = [length for length in (8, 32, 128, 512, 2048, 8192) if length < max_input_tokens] + [max_input_tokens]
    mixed: list[int] = []
    for length in cycle(reversed(lengths)):
        if sum(mixed) + length > max_batch_tokens and mixed:
            break
        mixed.append(length)
    full = [[length] * max(1, max_batch_tokens // length) for length in lengths] if device_type == "cuda" else []
    return [mixed, *full, *([length] for length in lengths)]

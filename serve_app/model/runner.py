"""Computes one batch on the device: the model once over all its tokens, then the task's head."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from serve_app.model.bucketing import BucketedForward, IndexArray, Part
from serve_app.model.loader import LoadedModel
from serve_app.tasks.heads import Head
from serve_app.types import FloatArray, TokenBatch


class Runner:
    """One model and one head on one device. Not thread-safe: one device thread calls `run`."""

    def __init__(self, loaded: LoadedModel, head: Head) -> None:
        self._loaded = loaded
        self._head = head
        self._thread: int | None = None
        self._forward: Callable[[TokenBatch], Iterable[Part]]
        self._forward, self.mode = self._choose_forward()

    def run(self, batch: TokenBatch) -> FloatArray:
        """The head's rows (n, d) float32 for the n sequences of `batch`, in its order.

        Raises what torch raises: torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError.
        """
        self._govern_threads()
        with torch.inference_mode():
            parts = [(part.rows, self._head(part.hidden, part.cu_seqlens)) for part in self._forward(batch)]
            return _in_order(parts)

    def warm_up(self, max_batch_tokens: int) -> None:
        """Run batches over the range of shapes, so that no request pays for first-time work."""
        for length in _warm_up_lengths(self._loaded.max_input_tokens):
            for count in sorted({1, max(1, max_batch_tokens // length)}):
                self.run(self._random_batch([length] * count))

    def _govern_threads(self) -> None:
        """Give this thread its share of the cores. OpenMP keeps the number per calling thread."""
        if threading.get_ident() != self._thread:
            torch.set_num_threads(self._loaded.num_threads)
            self._thread = threading.get_ident()

    def _choose_forward(self) -> tuple[Callable[[TokenBatch], Iterable[Part]], str]:
        loaded = self._loaded
        bucketed = BucketedForward(loaded.module, loaded.device, loaded.pad_token_id, loaded.takes_token_types)
        return bucketed, "bucketed: packing is not built in"

    def _random_batch(self, lengths: list[int]) -> TokenBatch:
        generator = np.random.default_rng(0)
        low = min(self._loaded.pad_token_id + 1, self._loaded.vocab_size - 1)
        return TokenBatch(
            input_ids=generator.integers(low, self._loaded.vocab_size, sum(lengths), dtype=np.int32),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            cu_requests=np.array([0, len(lengths)], np.int32),
            truncated=np.zeros(len(lengths), np.bool_),
        )


def _in_order(parts: list[tuple[IndexArray, Tensor]]) -> FloatArray:
    values: FloatArray = torch.cat([rows for _, rows in parts]).float().cpu().numpy()
    out = np.empty_like(values)
    out[np.concatenate([index for index, _ in parts])] = values
    return out


def _warm_up_lengths(max_input_tokens: int) -> list[int]:
    lengths = [length for length in (8, 32, 128, 512, 2048, 8192) if length < max_input_tokens]
    return [*lengths, max_input_tokens]

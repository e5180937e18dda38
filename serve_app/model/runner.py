"""Computes one batch on the device: the model once over all its tokens, then a head."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve_app.errors import ModelFailureError
from serve_app.model.acceptance import accept, random_batch
from serve_app.model.bucketing import IndexArray
from serve_app.model.heads import Arguments, Kept, heads_of
from serve_app.model.host import govern_threads, keep_freed_memory
from serve_app.model.loader import LoadedModel, known_ids
from serve_app.model.rows import SequenceRows
from serve_app.types import Int32Array, TokenBatch


class Runner:
    """One model with its heads on one device. Not thread-safe: one device thread calls `run`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._known_ids = known_ids(loaded.module)
        self._token_types = _token_types(loaded)
        self._thread: int | None = None
        self._govern_threads()
        accepted = accept(loaded)
        self._forward, self.mode = accepted.forward, accepted.mode
        self._heads = heads_of(loaded, accepted.own_head)
        if loaded.device.type == "cpu":
            keep_freed_memory()

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the heads it can be asked for; the first is the usual one."""
        return tuple(self._heads)

    def run(self, batch: TokenBatch, head: str | None = None, arguments: Arguments = ()) -> SequenceRows:
        """The head's rows for the n sequences of `batch`, in its order; `arguments` are of each, or none at all.

        Raises what torch raises: torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError; ValueError where the
        model has no such head, and IndexError for ids that its tables do not have.
        """
        return self.launch(head or self.heads[0], batch, arguments)()

    def launch(self, head: str, batch: TokenBatch, arguments: Arguments = ()) -> Callable[[], SequenceRows]:
        """Start the forward and the copy of its rows to the host; what is returned waits for them.

        On CUDA nothing here waits for the device, so that the next batch can be launched behind it (but for `splade`,
        and for classifiers of BART and T5, whose stock code looks for end tokens there). On CPU the rows are there at
        once. Both steps raise what `run` raises.
        """
        if head not in self._heads:
            raise ValueError(f"a model for {self._loaded.task} has no head {head}; it has: {', '.join(self._heads)}")
        self._check_ids(batch)
        self._govern_threads()
        with self._loaded.precision.computing(self._loaded.device):
            parts = [(part.rows, self._heads[head](part, arguments)) for part in self._forward(batch)]
            order = np.concatenate([rows for rows, _ in parts])
            arrived = _to_host(torch.cat([kept.rows for _, kept in parts]).float())
            counted = _counts_to_host([kept for _, kept in parts])
        return lambda: SequenceRows(arrived(), counted()).in_order(order)

    def _check_ids(self, batch: TokenBatch) -> None:
        """Raises IndexError for ids that a table of the model does not have, which would break a CUDA device for good.

        The tokenizer replica refuses such tokens, as far as the model's files tell what the model knows.
        """
        _check_below(self._known_ids, batch.input_ids, "token id")
        if batch.token_type_ids is not None:
            _check_below(self._token_types, batch.token_type_ids, "token type")

    def run_random(self, lengths: list[int]) -> None:
        """Every head over random sequences of these lengths, to measure what a batch costs at most."""
        for head in self._heads:
            self.run(self._dearest_batch(head, lengths), head)

    def probe(self) -> None:
        """Compute one random text of the longest length, which has worked before, with every head.

        Raises what `run` raises, and ModelFailureError where a row is not finite.
        """
        for head in self._heads:
            rows = self.run(random_batch(self._loaded, [self._loaded.max_input_tokens]), head)
            if not np.isfinite(rows.values).all():
                raise ModelFailureError(f"of random tokens the head {head} makes rows that are not finite")

    def warm_up(self, max_batch_tokens: int) -> float:
        """Run batches over the range of shapes, so that no request pays for first-time work.

        Returns how many seconds a full batch takes after that.
        """
        batches = warm_up_batches(self._loaded.max_input_tokens, max_batch_tokens, self._loaded.device.type)
        for lengths in batches:
            self._run_all_heads(lengths)
        started = time.monotonic()
        self._run_all_heads(batches[0])
        return time.monotonic() - started

    def _run_all_heads(self, lengths: list[int]) -> None:
        for head in self._heads:
            self.run(random_batch(self._loaded, lengths), head)

    def _dearest_batch(self, head: str, lengths: list[int]) -> TokenBatch:
        """A mask costs more than any other token, so for `mask-fill` all tokens are masks."""
        batch = random_batch(self._loaded, lengths)
        if head != "mask-fill":
            return batch
        return replace(batch, input_ids=np.full_like(batch.input_ids, self._loaded.mask_token_id))

    def _govern_threads(self) -> None:
        """Give this thread its share of the cores. OpenMP keeps the number per calling thread."""
        if threading.get_ident() != self._thread:
            govern_threads(self._loaded.num_threads)
            self._thread = threading.get_ident()


def _token_types(loaded: LoadedModel) -> int | None:
    """How many token types the model has a table for; None where it has no such table."""
    rows = getattr(loaded.module.config, "type_vocab_size", None)
    return rows if loaded.takes_token_types and isinstance(rows, int) and rows > 0 else None


def _check_below(rows: int | None, ids: Int32Array, kind: str) -> None:
    if rows is None or not ids.size:
        return
    for index in (int(ids.max()), int(ids.min())):
        if not 0 <= index < rows:
            raise IndexError(f"{kind} {index} is not among the model's own, which are 0 to {rows - 1}")


def _to_host(values: Tensor) -> Callable[[], Any]:
    """Copy to pinned memory behind the kernels that make the values; what is returned waits for the copy."""
    if not values.is_cuda:
        ready = values.numpy()
        return lambda: ready
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Any:
        copied.synchronize()
        return host.numpy()

    return arrived


def _counts_to_host(parts: Sequence[Kept]) -> Callable[[], Any]:
    """Where each sequence's rows start, (n + 1,) int32; None where each has one."""
    if parts[0].counts is None:
        return lambda: None
    known: list[Callable[[], IndexArray]] = [_counted(kept.counts) for kept in parts]
    return lambda: np.concatenate([[0], np.concatenate([counts() for counts in known]).cumsum()]).astype(np.int32)


def _counted(counts: IndexArray | Tensor | None) -> Callable[[], IndexArray]:
    if isinstance(counts, Tensor):
        return _to_host(counts)
    assert counts is not None
    return lambda: counts


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

"""Token batches for tests of the engine."""

from collections.abc import Callable, Sequence

import numpy as np

from serve_app.model.recovery import Collect, Launch, Work
from serve_app.model.rows import SequenceRows
from serve_app.model.scheduler import Job
from serve_app.types import ForwardCall, TokenBatch


def token_batch(requests: Sequence[Sequence[int]], marks: Sequence[int] | None = None) -> TokenBatch:
    """Requests given as lists of sequence lengths; each sequence's ids are all its mark (by default its number)."""
    lengths = [length for request in requests for length in request]
    marks = range(len(lengths)) if marks is None else marks
    return TokenBatch(
        input_ids=np.concatenate([np.full(n, mark, np.int32) for n, mark in zip(lengths, marks, strict=True)])
        if lengths
        else np.zeros(0, np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        cu_requests=np.concatenate([[0], np.cumsum([len(r) for r in requests])]).astype(np.int32),
        truncated=np.zeros(len(lengths), np.bool_),
    )


def forward_call(requests: Sequence[Sequence[int]], marks: Sequence[int] | None = None) -> ForwardCall:
    return ForwardCall(token_batch(requests, marks), "pooled", (None,) * len(requests))


def job(lengths: Sequence[int], **options) -> Job:
    options.setdefault("on_done", lambda job: None)
    return Job(tokens=token_batch([lengths]), head=options.pop("head", "pooled"), **options)


def marks_forward(batch: TokenBatch) -> np.ndarray:
    """A model whose row for a sequence is (its mark, its length): answers are right only for their own sequence."""
    starts = batch.cu_seqlens[:-1]
    return np.stack([batch.input_ids[starts], batch.lengths()], axis=1).astype(np.float32)


def immediately(forward: Callable[[TokenBatch], np.ndarray]) -> Launch:
    """A forward without anything asynchronous, whose sequences have one row each."""

    def launch(work: Work) -> Collect:
        rows = SequenceRows(forward(work.tokens))
        return lambda: rows

    return launch

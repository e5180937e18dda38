"""What is left of a sequence on the device: reductions of hidden states and of logits, without padding.

All are pure functions of tensors on one device; how a model's own head makes logits is the model replica's business
(`serve_app.model.heads`). Token ids among the rows travel as float32, which is exact below 2**24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve_app.types import MaskArguments

Pool: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`pool(hidden (total, h), cu_seqlens (n + 1,) int64) -> (n, h) float32`."""

Project: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states (t, h) -> logits over the vocabulary (t, v)."""

HEADS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("pooled", "tokens"),
    "text-classification": ("sequence-logits",),
    "rerank": ("sequence-logits",),
    "zero-shot-classification": ("sequence-logits",),
    "token-classification": ("token-logits",),
    "question-answering": ("span-logits",),
    "fill-mask": ("mask-fill", "splade"),
    "sparse-embedding": ("splade",),
}
"""The heads of a model that is served for each task. What rows they leave of a sequence:

pooled ............ one (h): its embedding, not normalised
tokens ............ one a token (h): its hidden states
sequence-logits ... one (labels)
token-logits ...... one a token (labels)
span-logits ....... one a token (2): start and end of an answer
mask-fill ......... for each mask, in order, one a candidate (2): token id and probability
splade ............ one a vocabulary entry that counts (2): its index and weight, by index
"""

NO_ARGUMENTS = MaskArguments(top_k=5)
"""For sequences of requests that say nothing."""

_CHUNK_ELEMENTS = 1 << 25
"""Logits over the vocabulary are made so many at a time: 128 MiB in float32."""

_CPU_CHUNK_ELEMENTS = 1 << 23
"""As many as are soon read again; larger ones cost more in page faults than they save in calls."""


def pooled(pooling: Literal["mean", "cls", "lasttoken"]) -> Pool:
    """One way of pooling; rows are float32 and not normalised."""
    return {"mean": mean, "cls": cls, "lasttoken": last_token}[pooling]


def mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over each sequence's tokens, summed in float32."""
    lengths = cu_seqlens.diff()
    return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0, unsafe=True)


def cls(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first token of each sequence."""
    return hidden.index_select(0, cu_seqlens[:-1]).float()


def last_token(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last token of each sequence."""
    return hidden.index_select(0, cu_seqlens[1:] - 1).float()


def fill_masks(
    hidden: Tensor, arguments: Sequence[MaskArguments], project: Project, vocab_size: int
) -> tuple[Tensor, list[int]]:
    """Candidates (r, 2) for `hidden` (m, h) of mask tokens, each with its request's arguments; and how many each has.

    Probabilities are of a softmax over the whole vocabulary, in float32. Nothing here waits for the device.
    Raises IndexError where a target is not in the vocabulary.
    """
    step = max(1, _CHUNK_ELEMENTS // vocab_size)
    counts = [len(asked.targets) or min(asked.top_k, vocab_size) for asked in arguments]
    rows = [
        _candidates(
            project(hidden[first : first + step]), arguments[first : first + step], counts[first : first + step]
        )
        for first in range(0, len(hidden), step)
    ]
    return torch.cat(rows) if rows else hidden.new_zeros((0, 2), dtype=torch.float32), counts


def _candidates(logits: Tensor, arguments: Sequence[MaskArguments], counts: Sequence[int]) -> Tensor:
    """Candidates (sum of counts, 2) of some masks; those that are asked the same are picked together."""
    probabilities = logits.float().softmax(dim=-1)
    starts = np.cumsum([0, *counts])
    rows = torch.empty((int(starts[-1]), 2), device=logits.device)
    for asked in dict.fromkeys(arguments):
        masks = np.array([mask for mask, each in enumerate(arguments) if each == asked])
        alike = len(masks) == len(arguments)
        chosen = probabilities if alike else probabilities.index_select(0, indices_on(logits, masks))
        ids, values = _pick(chosen, asked)
        places = starts[masks][:, None] + np.arange(ids.shape[1])
        candidates = torch.stack([ids.float(), values], dim=-1).flatten(0, 1)
        rows.index_copy_(0, indices_on(logits, places.ravel()), candidates)
    return rows


def _pick(probabilities: Tensor, asked: MaskArguments) -> tuple[Tensor, Tensor]:
    """Token ids and probabilities, each (m, k), of the targets in their order, or of the most likely tokens."""
    if not asked.targets:
        values, ids = probabilities.topk(min(asked.top_k, probabilities.shape[1]), dim=-1)
        return ids, values
    if not all(0 <= target < probabilities.shape[1] for target in asked.targets):
        raise IndexError("a target is not in the model's vocabulary")
    ids = indices_on(probabilities, np.array(asked.targets))
    return ids.expand(len(probabilities), -1), probabilities.index_select(1, ids)


def indices_on(tensor: Tensor, values: npt.NDArray[np.int64]) -> Tensor:
    """Indices that the host knows, on the tensor's device, without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    moved: Tensor = (host.pin_memory() if tensor.is_cuda else host).to(tensor.device, non_blocking=True)
    return moved


def splade(hidden: Tensor, lengths: Sequence[int], project: Project, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Rows (r, 2) of index and weight, for sequences of these lengths in a row; and how many each has (n,) int64.

    The weight of a vocabulary entry is the largest log(1 + relu(logit)) over the tokens of a sequence
    (https://arxiv.org/abs/2109.10086). How many are not zero only the device knows: here the host waits for it once.
    """
    weights = torch.cat(list(_largest_logits(hidden, lengths, project, vocab_size))).relu().log1p()
    sequences, index = weights.nonzero(as_tuple=True)
    rows = torch.stack([index.float(), weights[sequences, index]], dim=1)
    return rows, weights.count_nonzero(dim=1)


def _largest_logits(hidden: Tensor, lengths: Sequence[int], project: Project, vocab_size: int) -> Iterator[Tensor]:
    """The largest logits (n, v) float32 over each sequence's tokens, some sequences at a time."""
    start, step = 0, max(1, (_CHUNK_ELEMENTS if hidden.is_cuda else _CPU_CHUNK_ELEMENTS) // vocab_size)
    for together in _runs(lengths, step):
        run = hidden[start : start + sum(together)]
        if len(run) <= step:
            yield torch.stack([logits.amax(0) for logits in project(run).float().split(together)])
        else:  # one sequence that is longer than a step
            yield torch.stack([project(piece).float().amax(0) for piece in run.split(step)]).amax(0, keepdim=True)
        start += len(run)


def _runs(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbouring sequences with at most so many tokens together; a longer one stands alone."""
    run: list[int] = []
    for length in lengths:
        if run and sum(run) + length > most:
            yield run
            run = []
        run.append(length)
    if run:
        yield run

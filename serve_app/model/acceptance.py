"""How a loaded model will be computed, decided by trying: what differs from the stock model is not used.

The stock model's answer is the one it gives for a text without padding and without neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from serve_app.model import int8, linear, packing
from serve_app.model.bucketing import BucketedForward, Part
from serve_app.model.families import why_not_packed
from serve_app.model.loader import LoadedModel
from serve_app.types import TokenBatch

log = logging.getLogger(__name__)

Forward: TypeAlias = Callable[[TokenBatch], Iterable[Part]]

_NEIGHBOUR_TOLERANCE = 1e-5
"""With the same shapes the same kernels run: other neighbours must change nothing, in any dtype."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The way to compute a model: `mode` is "packed", or "bucketed…: " and the reason."""

    forward: Forward
    mode: str


def accept(loaded: LoadedModel) -> Accepted:
    """Try the fastest way first; changes `loaded.module` in place. Logs a warning where a family in PACKED fails.

    Raises what torch raises where even the stock model cannot run.
    """
    with loaded.precision.computing(loaded.device):
        return _accept(loaded)


def _accept(loaded: LoadedModel) -> Accepted:
    unpadded = BucketedForward(
        loaded.module, loaded.device, loaded.pad_token_id, loaded.takes_token_types, equal_lengths=True
    )
    probes = random_batch(loaded, _probe_lengths(loaded))
    reference, exchanged = _exchange_projections(loaded, unpadded, probes)
    reason = why_not_packed(loaded.model_type)
    if reason is None:
        padded_total = linear.padded_rows if exchanged else int
        packed, reason = _try_packing(loaded, padded_total, probes, reference)
        if packed is not None:
            return Accepted(packed, "packed")
        log.warning("%s is not packed, and slower for it: %s", loaded.model_type, reason)
    padded = replace(unpadded, equal_lengths=False)
    if _difference(_hidden(padded, probes), reference) <= loaded.precision.tolerance:
        return Accepted(padded, f"bucketed: {reason}")
    log.warning("%s: padding changes its answers, so only texts of equal length share a pass", loaded.model_type)
    return Accepted(unpadded, f"bucketed by equal length: {reason}")


def random_batch(loaded: LoadedModel, lengths: list[int], seed: int = 0) -> TokenBatch:
    """Random tokens, none of them padding, as one request of sequences of these lengths."""
    low = min(loaded.pad_token_id + 1, loaded.vocab_size - 1)
    return TokenBatch(
        input_ids=np.random.default_rng(seed).integers(low, loaded.vocab_size, sum(lengths), dtype=np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        cu_requests=np.array([0, len(lengths)], np.int32),
        truncated=np.zeros(len(lengths), np.bool_),
    )


def _probe_lengths(loaded: LoadedModel) -> list[int]:
    """Mixed, with equal ones among them, and one that is longer than a short attention window."""
    window = getattr(loaded.module.config, "sliding_window", None) or 0
    longest = 2 * window + 3 if window <= 512 else 48
    return [min(length, loaded.max_input_tokens) for length in (5, 17, 1, 5, max(longest, 33), 9)]


def _exchange_projections(loaded: LoadedModel, forward: Forward, probes: TokenBatch) -> tuple[Tensor, bool]:
    """Put faster projections in, where there are any; returns the answers to compare with, and whether it did."""
    stock = _hidden(forward, probes)
    if loaded.precision.int8:
        _apply(int8.plan_swaps(loaded.module))
        rounded = _hidden(forward, probes)
        log.info("%s in 8 bits: hidden states move by %.1e", loaded.model_type, _difference(rounded, stock))
        return rounded, True
    if not linear.pays(loaded.module):
        return stock, False
    swaps = _apply(linear.plan_swaps(loaded.module, lambda: _hidden(forward, probes)))
    error = _difference(_hidden(forward, probes), stock)
    if error <= loaded.precision.tolerance:
        return stock, True
    for swap in swaps:
        swap.undo()
    log.warning("%s keeps torch's projections: oneDNN's differ by %.1e", loaded.model_type, error)
    return stock, False


def _apply(swaps: list[linear.Swap]) -> list[linear.Swap]:
    for swap in swaps:
        swap.apply()
    return swaps


def _try_packing(
    loaded: LoadedModel, padded_total: Callable[[int], int], probes: TokenBatch, reference: Tensor
) -> tuple[Forward, None] | tuple[None, str]:
    stock_attention = loaded.module.config._attn_implementation
    try:
        packed = packing.prepare(loaded, padded_total)
        reason = why_refused(packed, loaded, probes, reference)
    except (packing.CannotPackError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as failure:
        reason = f"{type(failure).__name__}: {failure}"
    if reason is None:
        return packed, None
    loaded.module.set_attn_implementation(stock_attention)
    return None, reason


def why_refused(packed: Forward, loaded: LoadedModel, probes: TokenBatch, reference: Tensor) -> str | None:
    """None where `packed` answers as `reference` (total, h) says and as it does beside other neighbours."""
    error = _difference(_hidden(packed, probes), reference)
    leak = _leak(packed, loaded, probes)
    if error <= loaded.precision.tolerance and leak <= _NEIGHBOUR_TOLERANCE:
        return None
    return f"packed, it differs from itself alone by {error:.1e}, and with other neighbours by {leak:.1e}"


def _leak(packed: Forward, loaded: LoadedModel, probes: TokenBatch) -> float:
    """How much the even sequences change when the odd ones get other tokens, and the other way round."""
    odd = np.repeat(np.arange(probes.num_sequences) % 2 == 1, probes.lengths())
    other = random_batch(loaded, probes.lengths().tolist(), seed=1).input_ids
    before = _hidden(packed, probes)
    worst = 0.0
    for changed in (odd, ~odd):
        after = _hidden(packed, replace(probes, input_ids=np.where(changed, other, probes.input_ids)))
        kept = torch.from_numpy(~changed)
        worst = max(worst, _difference(after[kept], before[kept]))
    return worst


def _hidden(forward: Forward, batch: TokenBatch) -> Tensor:
    """Hidden states (total, h) float32 on the host, in the order of the batch."""
    rows, pieces = [], []
    for part in forward(batch):
        rows.extend(part.rows.tolist())
        pieces.extend(part.hidden.float().cpu().split(part.cu_seqlens.diff().tolist()))
    return torch.cat([piece for _, piece in sorted(zip(rows, pieces, strict=True), key=lambda pair: pair[0])])


def _difference(values: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where something is not a number."""
    difference = (values - reference).abs().max() / reference.abs().max().clamp_min(1e-6)
    return float(torch.nan_to_num(difference, nan=float("inf")))

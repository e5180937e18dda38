"""How a loaded model will be computed, decided by trying: what differs from the stock model is not used.

The stock model's answer is the one it gives for a text without padding and without neighbours: the hidden states of the
base, and what the whole model makes of the text, where it has a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from serve_app.errors import ConfigError
from serve_app.model import int8, linear, packing, stock
from serve_app.model.bucketing import BucketedForward, IndexArray, Part
from serve_app.model.families import why_not_packed
from serve_app.model.loader import SEQUENCE_TASKS, LoadedModel
from serve_app.model.stock import Finished, OwnHead
from serve_app.types import TokenBatch

log = logging.getLogger(__name__)

Forward: TypeAlias = Callable[[TokenBatch], Iterable[Part]]

Answer: TypeAlias = Callable[[TokenBatch], Tensor]
"""A row for each token, or for each sequence, in float32 on the host, in the order of the batch."""

REFUSALS = (packing.CannotPackError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
"""What stock code raises that was not written for this."""

_NEIGHBOUR_TOLERANCE = 1e-5
"""With the same shapes the same kernels run: other neighbours must change nothing, in any dtype."""

_MASKED_EVERY = 7
_MOST_LOGITS = 1 << 27
"""That a whole model may make at a time: half a gigabyte in float32."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The way to compute a model: `mode` is "packed", or "bucketed…: " and the reason."""

    forward: Forward
    mode: str
    own_head: OwnHead | None = None
    """What makes logits of `forward`'s parts; None where the model has no head of its own."""


def accept(loaded: LoadedModel) -> Accepted:
    """Try the fastest way first; changes `loaded.module` in place. Logs a warning where a family in PACKED fails.

    Raises ConfigError where even the stock model cannot run, and what torch raises about the device.
    """
    with loaded.precision.computing(loaded.device):
        try:
            return _accept(loaded)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except REFUSALS as failure:
            raise _cannot_be_tried(loaded, failure) from failure


def _accept(loaded: LoadedModel) -> Accepted:
    probes = random_batch(loaded, _probe_lengths(loaded))
    unpadded = BucketedForward(
        module=loaded.module,
        device=loaded.device,
        pad_token_id=loaded.pad_token_id,
        takes_token_types=loaded.takes_token_types,
        equal_lengths=True,
        decoder_start=loaded.decoder_start,
    )
    answers = None if loaded.model is None else _alone(loaded, probes)
    if answers is not None and loaded.module is loaded.model:
        return _accept_whole(loaded, probes, answers, "head and base are one class")
    reference, exchanged = _exchange_projections(loaded, unpadded, probes)
    if loaded.model is not None and loaded.precision.int8:
        answers = _alone(loaded, probes)
    base = _accept_base(loaded, unpadded, probes, reference, linear.padded_rows if exchanged else int)
    return base if answers is None else _accept_head(loaded, base, probes, answers)


def _accept_base(
    loaded: LoadedModel,
    unpadded: BucketedForward,
    probes: TokenBatch,
    reference: Tensor,
    padded_total: Callable[[int], int],
) -> Accepted:
    """How to compute hidden states."""
    reason = why_not_packed(loaded.model_type)
    if reason is None:
        packed, reason = _try_packing(loaded, padded_total, probes, reference)
        if packed is not None:
            return Accepted(packed, "packed")
        log.warning("%s is not packed, and slower for it: %s", loaded.model_type, reason)
    padded = replace(unpadded, equal_lengths=False)
    if _difference(hidden_states(padded, probes), reference) <= loaded.precision.tolerance:
        return Accepted(padded, f"bucketed: {reason}")
    log.warning("%s: padding changes its answers, so only texts of equal length share a pass", loaded.model_type)
    return Accepted(unpadded, f"bucketed by equal length: {reason}")


def _accept_head(loaded: LoadedModel, base: Accepted, probes: TokenBatch, answers: Tensor) -> Accepted:
    """The model's own head on those hidden states, or else the whole stock model."""
    try:
        head = stock.attach(loaded)
        own = _answers_of(base.forward, head, loaded.task)
        reason = why_refused(own, loaded, probes, answers, "on its own")
    except REFUSALS as failure:
        reason = f"{type(failure).__name__}: {failure}"
    if reason is None:
        return replace(base, own_head=head)
    return _accept_whole(loaded, probes, answers, f"its head: {reason}")


def _accept_whole(loaded: LoadedModel, probes: TokenBatch, answers: Tensor, reason: str) -> Accepted:
    """The stock model, head and all, in padded buckets."""
    log.warning("%s is computed as a whole, and slower for it: %s", loaded.model_type, reason)
    whole = _whole(loaded)
    try:
        padded = _difference(_answers_of(whole, Finished(), loaded.task)(probes), answers)
    except REFUSALS:
        padded = float("inf")
    if padded <= loaded.precision.tolerance:
        return Accepted(whole, f"bucketed: {reason}", Finished())
    log.warning("%s: padding changes its answers, so only texts of equal length share a pass", loaded.model_type)
    return Accepted(replace(whole, equal_lengths=True), f"bucketed by equal length: {reason}", Finished())


def _whole(loaded: LoadedModel) -> BucketedForward:
    """The stock model with its head, padded."""
    logits_per_token = 1 if loaded.task in SEQUENCE_TASKS else max(1, loaded.vocab_size)
    return BucketedForward(
        module=loaded.model,
        device=loaded.device,
        pad_token_id=loaded.pad_token_id,
        takes_token_types=loaded.takes_token_types,
        max_padded_tokens=min(16_384, max(1, _MOST_LOGITS // logits_per_token)),
        read=stock.read_logits,
    )


def _alone(loaded: LoadedModel, probes: TokenBatch) -> Tensor:
    """What the whole stock model makes of each text, one at a time.

    Raises ConfigError where it takes texts of a certain form only, so that nothing can be compared.
    """
    one_by_one = replace(_whole(loaded), equal_lengths=True, max_padded_tokens=1)
    try:
        return _answers_of(one_by_one, Finished(), loaded.task)(probes)
    except (AssertionError, *REFUSALS) as failure:
        raise _cannot_be_tried(loaded, failure) from failure


def _cannot_be_tried(loaded: LoadedModel, failure: BaseException) -> ConfigError:
    return ConfigError(
        f"{loaded.model_type} cannot be served for {loaded.task}: on random texts of 1 to some 50 tokens transformers' "
        f"own model raises {type(failure).__name__}: {failure}. Serve a model of another family"
    )


def _answers_of(forward: Forward, head: OwnHead, task: str) -> Answer:
    def answer(batch: TokenBatch) -> Tensor:
        if task in SEQUENCE_TASKS:
            return _in_order((part.rows, head.sequences(part), np.ones_like(part.rows)) for part in forward(batch))
        return _in_order((part.rows, head.tokens(part.hidden), part.lengths) for part in forward(batch))

    return answer


def random_batch(loaded: LoadedModel, lengths: list[int], seed: int = 0) -> TokenBatch:
    """Random tokens, none of them padding, as one request of sequences of these lengths.

    Each ends with the model's end token, where it has one, and has masks, where the model fills them.
    """
    special = stock.special_tokens(loaded)
    usual = np.array([token for token in range(loaded.vocab_size) if token not in special], np.int32)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    input_ids = np.random.default_rng(seed).choice(usual, sum(lengths))
    if loaded.task == "fill-mask" and loaded.mask_token_id is not None:
        input_ids[::_MASKED_EVERY] = loaded.mask_token_id
    end = getattr(loaded.module.config, "eos_token_id", None)
    if isinstance(end, int) and end != loaded.pad_token_id and end < loaded.vocab_size:
        input_ids[cu_seqlens[1:] - 1] = end
    return TokenBatch(
        input_ids=input_ids,
        cu_seqlens=cu_seqlens,
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
    exact = hidden_states(forward, probes)
    if loaded.precision.int8:
        _apply(int8.plan_swaps(loaded.module))
        rounded = hidden_states(forward, probes)
        log.info("%s in 8 bits: hidden states move by %.1e", loaded.model_type, _difference(rounded, exact))
        return rounded, True
    if not linear.pays(loaded.module):
        return exact, False
    # A vocabulary is as dear as an encoder where each token is projected on it, and for a mask dear to read.
    exchanged = loaded.model if loaded.task in ("sparse-embedding", "fill-mask") else loaded.module
    swaps = _apply(linear.plan_swaps(exchanged, lambda: hidden_states(forward, probes)))
    error = _difference(hidden_states(forward, probes), exact)
    if error <= loaded.precision.tolerance:
        return exact, True
    for swap in swaps:
        swap.undo()
    log.warning("%s keeps torch's projections: oneDNN's differ by %.1e", loaded.model_type, error)
    return exact, False


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
        reason = why_refused(lambda batch: hidden_states(packed, batch), loaded, probes, reference, "packed")
    except REFUSALS as failure:
        reason = f"{type(failure).__name__}: {failure}"
    if reason is None:
        return packed, None
    loaded.module.set_attn_implementation(stock_attention)
    return None, reason


def why_refused(
    answer: Answer, loaded: LoadedModel, probes: TokenBatch, reference: Tensor, how: str = "packed"
) -> str | None:
    """None where `answer` is as `reference` says, and the same beside other neighbours."""
    error = _difference(answer(probes), reference)
    leak = _leak(answer, loaded, probes)
    if error <= loaded.precision.tolerance and leak <= _NEIGHBOUR_TOLERANCE:
        return None
    return f"{how}, it differs from itself alone by {error:.1e}, and with other neighbours by {leak:.1e}"


def _leak(answer: Answer, loaded: LoadedModel, probes: TokenBatch) -> float:
    """How much the even sequences change when the odd ones get other tokens, and the other way round."""
    odd = np.arange(probes.num_sequences) % 2 == 1
    other = random_batch(loaded, probes.lengths().tolist(), seed=1).input_ids
    before = answer(probes)
    worst = 0.0
    for changed in (odd, ~odd):
        tokens = np.repeat(changed, probes.lengths())
        after = answer(replace(probes, input_ids=np.where(tokens, other, probes.input_ids)))
        kept = torch.from_numpy(~(tokens if len(before) == len(tokens) else changed))
        worst = max(worst, _difference(after[kept], before[kept]))
    return worst


def hidden_states(forward: Forward, batch: TokenBatch) -> Tensor:
    """Hidden states (total, h) float32 on the host, in the order of the batch."""
    return _in_order((part.rows, part.hidden, part.lengths) for part in forward(batch))


def _in_order(parts: Iterable[tuple[IndexArray, Tensor, IndexArray]]) -> Tensor:
    """Values of each part's sequences, so many each, in the order of the batch."""
    rows, pieces = [], []
    for sequences, values, counts in parts:
        rows.extend(sequences.tolist())
        pieces.extend(values.float().cpu().split(counts.tolist()))
    return torch.cat([piece for _, piece in sorted(zip(rows, pieces, strict=True), key=lambda pair: pair[0])])


def _difference(values: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where something is not a number."""
    difference = (values - reference).abs().max() / reference.abs().max().clamp_min(1e-6)
    return float(torch.nan_to_num(difference, nan=float("inf")))

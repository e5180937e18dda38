"""Attention over packed sequences, as an implementation that stock transformers models can be switched to.

Registered under NAME in transformers' interfaces. While a plan is active, queries, keys and values hold many sequences
in one row, and attention never crosses from one sequence to another. While none is, it is plain SDPA, so that
`generate` and any other use of the model work as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "serve_app_packed"

Window: TypeAlias = int | None
"""Tokens at a distance below this see each other; None for all."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring sequences of one length: `count` of them, `length` tokens each, from token `start` on."""

    start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the sequences of one packed row lie; built once for a batch, read by every layer.

    `total` counts the row's tokens, with any filler behind the last sequence, which attends to nothing.
    `cu_seqlens` (n + 1,) int32 and `position_ids` (1, total) int64 are on the device.
    """

    runs: tuple[Run, ...]
    total: int
    max_length: int
    cu_seqlens: Tensor
    position_ids: Tensor
    masks: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """Who sees whom inside one sequence, in one layer; `bias` (1 or n_heads, length, length) is added to the scores."""

    scale: float | None
    causal: bool
    window: Window
    bias: Tensor | None


def runs(lengths: list[int]) -> tuple[Run, ...]:
    """Group sequences (in the order in which they lie) into runs of equal length."""
    found, start = [], 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        found.append(Run(start, count, length))
        start += count * length
    return tuple(found)


_active: ContextVar[Plan | None] = ContextVar("plan", default=None)


@contextmanager
def use(plan: Plan) -> Iterator[None]:
    """Attention below this block follows `plan`."""
    token = _active.set(plan)
    try:
        yield
    finally:
        _active.reset(token)


def active_plan() -> Plan | None:
    """The plan of the packed row that is being computed on this thread, if one is."""
    return _active.get()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: Window = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What layers call: query (1, n_heads, total, d), key and value with as many heads or a divisor.

    Returns (1, total, n_heads, d). Raises ValueError where the call is not self-attention over the plan's row, or asks
    for something that changes scores in a way unknown here.
    """
    plan = _active.get()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if plan is None:
        extra = {} if position_bias is None else {"position_bias": position_bias}
        answer: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=causal, **extra, **kwargs
        )
        return answer
    _refuse_unknown(plan, query, key, attention_mask, kwargs)
    rule = Rule(scaling, causal, sliding_window, position_bias)
    if _varlen is not None and _flash_takes(query, rule):
        return one_kernel(_varlen, query, key, value, plan, rule), None
    return run_by_run(query, key, value, plan, rule), None


def _flash_takes(query: Tensor, rule: Rule) -> bool:
    """What flash attention is built for; its kernels have no bias."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and rule.bias is None and query.shape[3] % 8 == 0 and query.shape[3] <= 256


def _refuse_unknown(
    plan: Plan, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == plan.total:
        raise ValueError(f"attention over {tuple(query.shape)} and {tuple(key.shape)} is not packed self-attention")
    if attention_mask is not None and attention_mask.numel():
        raise ValueError("the layer brings an attention mask of its own")
    changed = [name for name in ("softcap", "s_aux", "head_mask") if kwargs.get(name) is not None]
    if changed:
        raise ValueError(f"the layer asks for {', '.join(changed)}")


def run_by_run(query: Tensor, key: Tensor, value: Tensor, plan: Plan, rule: Rule) -> Tensor:
    """One SDPA call for each run, on views: no padding and no copies but the last. Shapes as in `attention`."""
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for run in plan.runs:
        mask = _mask(plan, rule, run, query)
        output = scaled_dot_product_attention(
            _sequences(query, run),
            _sequences(key, run),
            _sequences(value, run),
            attn_mask=mask,
            is_causal=rule.causal and mask is None,
            scale=rule.scale,
            enable_gqa=grouped,
        )
        outputs.append(output.transpose(1, 2).reshape(run.count * run.length, query.shape[1], value.shape[3]))
    last = plan.runs[-1]
    filler = plan.total - (last.start + last.count * last.length)
    if filler:
        outputs.append(outputs[0].new_zeros(filler, query.shape[1], value.shape[3]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def _sequences(row: Tensor, run: Run) -> Tensor:
    """The sequences of a run as a view (count, n_heads, length, d) on the packed row (1, n_heads, total, d)."""
    _, of_head, of_token, of_value = row.stride()
    return row.as_strided(
        (run.count, row.shape[1], run.length, row.shape[3]),
        (run.length * of_token, of_head, of_token, of_value),
        row.storage_offset() + run.start * of_token,
    )


def _mask(plan: Plan, rule: Rule, run: Run, query: Tensor) -> Tensor | None:
    """What SDPA cannot do by itself: a window that is shorter than the sequences, and a bias.

    A bias that is the same for all keys changes no softmax, and is left out.
    """
    windowed = rule.window is not None and run.length > rule.window
    if rule.bias is None and not windowed:
        return None
    bias = None if rule.bias is None or rule.bias.shape[-1] == 1 else rule.bias[..., : run.length, : run.length]
    if not windowed and not rule.causal:
        return bias
    band = _band(plan, run.length, rule.window or run.length, rule.causal, query)
    return band if bias is None else bias.masked_fill(~band, torch.finfo(query.dtype).min)


def _band(plan: Plan, length: int, window: int, causal: bool, query: Tensor) -> Tensor:
    """Boolean mask (length, length): true within the window, and not ahead where `causal`."""
    key = (length, window, causal)
    if key not in plan.masks:
        positions = torch.arange(length, device=query.device)
        distance = positions[:, None] - positions[None, :]
        band = (distance < window) & (distance > (-1 if causal else -window))
        plan.masks[key] = band
    return plan.masks[key]


def one_kernel(varlen_attn: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, rule: Rule) -> Tensor:
    """All sequences in one call of `torch.nn.attention.varlen.varlen_attn`. Shapes as in `attention`, no bias."""
    reach = -1 if rule.window is None else rule.window - 1
    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]
    lengths = (plan.cu_seqlens, plan.cu_seqlens, plan.max_length, plan.max_length)
    window = (reach, 0 if rule.causal else reach)
    output: Tensor = varlen_attn(*rows, *lengths, scale=rule.scale, window_size=window, **options)
    return output.unsqueeze(0)


def _find_varlen() -> Any:
    """`varlen_attn` of torch, whose keywords vary between versions; None where those needed are missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters) else None


_varlen = _find_varlen()


def no_mask(device: torch.device) -> Tensor:
    """A mask of nothing, which stops decoders from looking for sequences in the positions.

    They would wait for the device to do so, and `find_packed_sequence_indices` in transformers finds nothing that the
    plan does not say.
    """
    return torch.empty(0, 0, 0, 0, device=device)


def _mask_for_layers(*args: Any, **kwargs: Any) -> Tensor | None:
    """Packed rows need no mask: the plan says who sees whom."""
    mask: Tensor | None = None if _active.get() is not None else sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask_for_layers)

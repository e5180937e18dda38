"""Sequences packed into one row without padding, through stock transformers models.

The model is called with `input_ids` (1, total) and the position of each token in its own sequence. Everything in an
encoder works token by token (embeddings, projections, norms) except attention, which follows the active plan
(`serve_app.model.attention`). Some kinds of modules count positions themselves from the length of the row, and get
small wrappers: `embed_positions` (BART, Marian, Pegasus), `compute_bias` (T5), MPNet's own attention, and T5's cross
attention, which makes a table of zeros over the row. A decoder that classifies reads its sequence shifted by one token,
so its cross attention goes from a sequence to itself, and follows the same plan.

Which families this is right for is a table (`serve_app.model.families`); at load, each model is compared with its own
answers for texts alone, and one that differs is not packed (`serve_app.model.acceptance`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from serve_app.model import attention
from serve_app.model.attention import Plan
from serve_app.model.bucketing import IndexArray, Part, shifted
from serve_app.model.loader import LoadedModel
from serve_app.types import Int32Array, TokenBatch


class CannotPackError(Exception):
    """This model cannot be packed; the message is the reason."""


@dataclass(frozen=True, slots=True)
class PackedForward:
    """Runs a model that `prepare` has switched to packed attention."""

    module: Any
    device: torch.device
    takes_token_types: bool
    takes_positions: bool
    is_decoder: bool
    first_position: int
    pad_token_id: int
    padded_total: Callable[[int], int] = int
    """How many tokens a row of so many gets: more where the device is better at some numbers than at others."""
    decoder_start: int | None = None
    """First token of the decoder, where there is one."""

    def __call__(self, batch: TokenBatch) -> Iterator[Part]:
        """Compute all sequences of `batch`, which has at least one; call under `inference_mode`."""
        rows, tokens = by_length(batch.cu_seqlens)
        lengths = batch.lengths()[rows].astype(np.int64)
        ends = lengths.cumsum()
        total = self.padded_total(len(tokens))
        positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths) + self.first_position
        input_ids, starts = batch.input_ids[tokens], np.concatenate([[0], ends])
        host = {"input_ids": _row(input_ids, total, self.pad_token_id)}
        if self.takes_token_types and batch.token_type_ids is not None:
            host["token_type_ids"] = _row(batch.token_type_ids[tokens], total, 0)
        if self.decoder_start is not None:
            host["decoder_input_ids"] = _row(shifted(input_ids, starts, self.decoder_start), total, self.pad_token_id)
        cu_seqlens, position_ids, *inputs = self._to_device(
            [starts, _row(positions, total, self.first_position), *host.values()]
        )
        plan = Plan(
            runs=attention.runs(lengths.tolist()),
            total=total,
            max_length=int(lengths[-1]),
            cu_seqlens=cu_seqlens.to(torch.int32),
            position_ids=position_ids[None],
        )
        hidden = self._hidden(plan, dict(zip(host, inputs, strict=True)))
        yield Part(rows, hidden[: len(tokens)], cu_seqlens, lengths, input_ids)

    def _hidden(self, plan: Plan, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states (plan.total, h), from inputs (plan.total,) by name."""
        arguments = {name: values[None] for name, values in inputs.items()}
        if self.takes_positions:
            arguments["position_ids"] = plan.position_ids
        if self.is_decoder:
            arguments["attention_mask"] = attention.no_mask(self.device)
        with attention.use(plan):
            hidden: Tensor = self.module(**arguments).last_hidden_state
        return hidden[0]

    def _to_device(self, host: list[IndexArray]) -> tuple[Tensor, ...]:
        """All in one copy, from pinned memory where the device is a GPU."""
        whole = torch.from_numpy(np.concatenate(host))
        if self.device.type == "cuda":
            whole = whole.pin_memory()
        parts: tuple[Tensor, ...] = whole.to(self.device, non_blocking=True).split([len(part) for part in host])
        return parts


def _row(values: IndexArray | Int32Array, total: int, fill: int) -> IndexArray:
    row = np.full(total, fill, np.int64)
    row[: len(values)] = values
    return row


def by_length(cu_seqlens: Int32Array) -> tuple[IndexArray, IndexArray]:
    """Sequences from short to long, and the tokens in that order: indices (n,) and (total,)."""
    lengths = np.diff(cu_seqlens).astype(np.int64)
    rows = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[rows]
    shift = cu_seqlens[rows] - (sorted_lengths.cumsum() - sorted_lengths)
    return rows, np.arange(lengths.sum()) + np.repeat(shift, sorted_lengths)


def prepare(loaded: LoadedModel, padded_total: Callable[[int], int] = int) -> PackedForward:
    """Switch the model to packed attention; a call of it without a plan computes what it did before.

    Raises CannotPackError where the model's attention is not behind transformers' interface.
    """
    module = loaded.module
    if module.config.model_type != "mpnet":
        module.set_attn_implementation(attention.NAME)
        if module.config._attn_implementation != attention.NAME:
            raise CannotPackError("its attention is not behind transformers' attention interface")
    parameters = inspect.signature(module.forward).parameters
    for part in module.modules():
        _count_positions_in_sequences(part)
    return PackedForward(
        module=module,
        device=loaded.device,
        takes_token_types=loaded.takes_token_types,
        takes_positions="position_ids" in parameters,
        is_decoder=_is_decoder(module),
        first_position=_first_position(module),
        pad_token_id=loaded.pad_token_id,
        padded_total=padded_total,
        decoder_start=loaded.decoder_start,
    )


def _is_decoder(module: Any) -> bool:
    """Whether every token sees only those before it, as in Llama and GPT-2; not an encoder-decoder."""
    causal = any(getattr(part, "is_causal", False) is True for part in module.modules())
    return causal and not module.config.is_encoder_decoder


def _first_position(module: Any) -> int:
    """RoBERTa and its kin start at `padding_idx + 1`: they derive positions from the tokens that are not padding."""
    embeddings: Any = getattr(module, "embeddings", None)
    derived = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
    return int(embeddings.padding_idx) + 1 if derived else 0


def _count_positions_in_sequences(part: Any) -> None:
    if hasattr(part, "embed_positions"):
        part.embed_positions.register_forward_pre_hook(_positions_of_plan, with_kwargs=True)
    if hasattr(part, "compute_bias"):
        part.compute_bias = _bias_of_longest_sequence(part.compute_bias)
    if (
        hasattr(part, "EncDecAttention")
        and "position_bias" in inspect.signature(part.EncDecAttention.forward).parameters
    ):
        part.EncDecAttention.register_forward_pre_hook(_no_bias_over_the_row, with_kwargs=True)
    if isinstance(part, MPNetEncoder):
        part.compute_position_bias = _position_bias_of_longest_sequence(part.compute_position_bias)
    if isinstance(part, MPNetSelfAttention):
        part.forward = MethodType(_mpnet_attention, part)


def _positions_of_plan(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    plan = attention.active_plan()
    return args, kwargs if plan is None else {**kwargs, "position_ids": plan.position_ids[0]}


def _no_bias_over_the_row(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """T5's cross attention has no bias: one zero for all, in place of one for each pair of the row's tokens."""
    if attention.active_plan() is None or kwargs.get("position_bias") is not None:
        return args, kwargs
    return args, {**kwargs, "position_bias": args[0].new_zeros(1, 1, 1, 1)}


def _bias_of_longest_sequence(compute_bias: Any) -> Any:
    """T5's bias of the longest sequence, from which each takes its corner, in place of one over the whole row."""

    def compute(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        plan = attention.active_plan()
        if plan is not None:
            query_length = key_length = plan.max_length
        bias: Tensor = compute_bias(query_length, key_length, *args, **kwargs)
        return bias

    return compute


def _position_bias_of_longest_sequence(compute_position_bias: Any) -> Any:
    """The same for MPNet, which measures the hidden states (1, total, h) instead of being told lengths."""

    def compute(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = attention.active_plan()
        measured = hidden if plan is None else hidden[:, : plan.max_length]
        bias: Tensor = compute_position_bias(measured, *args, **kwargs)
        return bias

    return compute


def _mpnet_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor]:
    """MPNetSelfAttention.forward with scores left to SDPA; the stock one computes them by hand."""
    shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
    packed = attention.active_plan() is not None
    output = attention.attention(
        self,
        query,
        key,
        value,
        attention_mask=None if packed else attention_mask,
        scaling=1 / math.sqrt(self.attention_head_size),
        is_causal=False,
        position_bias=position_bias,
    )
    return (self.o(output[0].flatten(-2)),)

"""A task model's own head, applied to hidden states that were computed without padding.

The head's code stays that of transformers: the whole stock model is called, with a stand-in in place of its base that
hands over hidden states. What a head for whole sequences reads of them (the first token, the last one, all of them) is
found by trying, so that no more than that is gathered.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from serve_app.model.bucketing import IndexArray, Part, split
from serve_app.model.loader import LoadedModel
from serve_app.tasks.heads import indices_on
from serve_app.types import Int32Array

Reads: TypeAlias = Literal["first", "last", "all"]

_MOST_PADDED_TOKENS = 16_384
_TRIED_TOKENS = 7


class OwnHead(Protocol):
    """What a model makes of its hidden states."""

    def tokens(self, hidden: Tensor) -> Tensor:
        """Hidden states (t, h) of any tokens -> (t, d)."""

    def sequences(self, part: Part) -> Tensor:
        """(k, d), a row for each sequence of the part."""


class Finished:
    """Of a model that was computed as a whole: nothing is left to do."""

    def tokens(self, hidden: Tensor) -> Tensor:
        return hidden

    def sequences(self, part: Part) -> Tensor:
        return part.hidden


def read_logits(output: Any) -> Tensor:
    """Logits of a stock model's output; of question answering (…, 2): start and end."""
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output.logits
    return logits


class StandIn(nn.Module):  # type: ignore[misc]
    """In the place of a model's base: whatever it is called with, it hands over the hidden states it was given."""

    def __init__(self, base: Any, output_type: type, pools: bool) -> None:
        super().__init__()
        # Not registered: the base stays where it is, and heads find what else they want of it (word embeddings).
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "hidden", None)
        self._output_type, self._pools = output_type, pools

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pooled = {"pooler_output": self._pooled(self.hidden)} if self._pools else {}
        return self._output_type(last_hidden_state=self.hidden, **pooled)

    def _pooled(self, hidden: Tensor) -> Any:
        pooler = self.base.pooler
        if not isinstance(pooler, nn.Linear):
            return pooler(hidden)
        # ALBERT and BigBird keep its parts apart.
        activation = getattr(self.base, "pooler_activation", None) or self.base.activation
        return activation(pooler(hidden[:, 0]))


@dataclass(frozen=True, slots=True)
class StockHead:
    """The head of one loaded model; `eos_token_id` is there where it reads the last token of that kind."""

    model: Any
    stand_in: StandIn
    reads: Reads
    eos_token_id: int | None
    pad_token_id: int | None
    plain_token_id: int
    """Any token but padding."""

    def tokens(self, hidden: Tensor) -> Tensor:
        return self._call(hidden[None], np.full((1, len(hidden)), self.plain_token_id))[0]

    def sequences(self, part: Part) -> Tensor:
        if self.reads == "all":
            return self._all_tokens(part)
        starts = np.concatenate([np.zeros(1, np.int64), part.lengths.cumsum()])
        wanted = starts[:-1] if self.reads == "first" else self._last(part.input_ids, starts)
        hidden = part.hidden.index_select(0, indices_on(part.hidden, wanted))[:, None]
        token = self.plain_token_id if self.eos_token_id is None else self.eos_token_id
        return self._call(hidden, np.full((len(wanted), 1), token))

    def _last(self, input_ids: Int32Array, starts: IndexArray) -> IndexArray:
        """Where the token stands that speaks for its sequence: the last end token, or the last but padding."""
        counted = np.ones(len(input_ids), np.bool_)
        if self.eos_token_id is not None:
            counted = input_ids == self.eos_token_id
        elif self.pad_token_id is not None:
            counted = input_ids != self.pad_token_id
        last = np.maximum.reduceat(np.where(counted, np.arange(len(input_ids)), -1), starts[:-1])
        without = starts[1:] - 1 if self.eos_token_id is not None else starts[:-1]
        return np.where(last < 0, without, last)

    def _all_tokens(self, part: Part) -> Tensor:
        """In padded buckets, for heads that pool over all tokens."""
        rows, order = [], []
        starts = np.concatenate([np.zeros(1, np.int64), part.lengths.cumsum()])
        for bucket in split(part.lengths.astype(np.int32), _MOST_PADDED_TOKENS):
            lengths = part.lengths[bucket]
            real = np.arange(lengths.max())[None, :] < lengths[:, None]
            places = np.where(real, starts[bucket][:, None] + np.arange(lengths.max())[None, :], 0)
            ids = np.where(real, part.input_ids[places], max(0, self.pad_token_id or 0))
            hidden = part.hidden.index_select(0, indices_on(part.hidden, places.ravel())).unflatten(0, places.shape)
            mask = indices_on(part.hidden, real.astype(np.int64))
            rows.append(self._call(hidden.masked_fill(mask[..., None] == 0, 0), ids, mask))
            order.append(bucket)
        return torch.cat(rows).index_select(0, indices_on(part.hidden, np.argsort(np.concatenate(order))))

    def _call(self, hidden: Tensor, input_ids: Any, mask: Tensor | None = None) -> Tensor:
        ids = indices_on(hidden, input_ids.astype(np.int64))
        object.__setattr__(self.stand_in, "hidden", hidden)
        try:
            return read_logits(self.model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask))
        finally:
            object.__setattr__(self.stand_in, "hidden", None)


def attach(loaded: LoadedModel) -> StockHead:
    """The head of `loaded.model`, to be used beside its base; nothing in the model is changed.

    Raises ValueError where the model has no base of its own.
    """
    model, base = loaded.model, loaded.module
    if base is model or getattr(model, model.base_model_prefix) is not base:
        raise ValueError("the model has no base that its head could be taken off")
    output = _output_of(loaded)
    pools = getattr(base, "pooler", None) is not None and getattr(output, "pooler_output", None) is not None
    stand_in = StandIn(base, type(output), pools)
    head_only = copy.copy(model)
    head_only._modules = {**model._modules, model.base_model_prefix: stand_in}
    config = model.config
    head = StockHead(
        model=head_only,
        stand_in=stand_in,
        reads="all",
        eos_token_id=config.eos_token_id if loaded.decoder_start is not None else None,
        pad_token_id=getattr(config, "pad_token_id", None),
        plain_token_id=plain_token(loaded),
    )
    return replace(head, reads=_what_it_reads(head, loaded))


def plain_token(loaded: LoadedModel) -> int:
    return next(token for token in range(loaded.vocab_size) if token not in special_tokens(loaded))


def special_tokens(loaded: LoadedModel) -> set[int]:
    config = loaded.module.config
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
    return {token for name in names if isinstance(token := getattr(config, name, None), int)}


def _output_of(loaded: LoadedModel) -> Any:
    """What the base itself answers, for its type."""
    ids = torch.full((1, 2), plain_token(loaded), device=loaded.device)
    decoder = {} if loaded.decoder_start is None else {"decoder_input_ids": ids}
    return loaded.module(input_ids=ids, **decoder)


def _what_it_reads(head: StockHead, loaded: LoadedModel) -> Reads:
    """Which tokens of a sequence change its logits: only the first, only the last, or others, too."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, _TRIED_TOKENS, loaded.hidden_size)
    hidden = torch.randn(shape, generator=generator).to(loaded.device, loaded.dtype)
    other = torch.randn(shape, generator=generator).to(loaded.device, loaded.dtype)
    ids = np.full((1, _TRIED_TOKENS), head.plain_token_id)
    if head.eos_token_id is not None:
        ids[0, -1] = head.eos_token_id
    logits = head._call(hidden, ids)
    if logits.dim() != 2:
        return "all"  # a head for tokens
    read = set()
    for token in range(_TRIED_TOKENS):
        changed = hidden.clone()
        changed[:, token] = other[:, token]
        if not torch.equal(head._call(changed, ids), logits):
            read.add(token)
    if read <= {0}:
        return "first"
    return "last" if read == {_TRIED_TOKENS - 1} else "all"

"""What the device computes: a prompt's prefill, and one step for all sequences under way."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from serve_app.errors import InvalidInputError, ModelFailureError
from serve_app.model.generation.rectangle import KeysAndValues, Rectangle, Room
from serve_app.model.loader import known_ids


@dataclass(eq=False, slots=True)
class Prefill:
    """A prompt on its way through the model. `prompt` (1, p) is the decoder's; `encoder_ids` (1, e) what is encoded."""

    prompt: Tensor
    encoder_ids: Tensor | None
    cache: Any
    done_tokens: int = 0
    encoded_tokens: int = 0
    logits: Tensor | None = None
    """(v,) of the token after the prompt, once all of it went through."""

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values `cache` holds."""
        return self.done_tokens + self.encoded_tokens


@dataclass(slots=True)
class Decoding:
    """The batch of one model. Belongs to the device thread. `model` is a stock `AutoModelFor…` in eval mode."""

    model: Any
    device: torch.device
    own: Rectangle = field(default_factory=Rectangle)
    cross: Rectangle = field(default_factory=lambda: Rectangle(slack=0))
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row in the decoder."""

    def __post_init__(self) -> None:
        self._arguments = inspect.signature(self.model.forward).parameters
        self._positions = RowPositions(self.model) if self.encodes else None
        self._known_ids = known_ids(self.model)

    _arguments: Any = field(init=False)
    _positions: RowPositions | None = field(init=False)
    _known_ids: int | None = field(init=False)

    @property
    def encodes(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def check_ids(self, input_ids: Sequence[int]) -> None:
        """Raises InvalidInputError for a token that the model has no embedding for, which would break a CUDA device.

        The tokenizer replica refuses such tokens, as far as the model's files tell what the model knows.
        """
        known = self._known_ids
        if known is not None and (min(input_ids) < 0 or max(input_ids) >= known):
            raise InvalidInputError(
                f"inputs: the model knows the tokens 0 to {known - 1}, and the prompt has others; send one without them"
            )

    @property
    def tokens(self) -> int:
        """Rows times columns whose keys and values memory is held for."""
        return self.own.tokens + self.cross.tokens

    def limit(self, room: Room) -> None:
        """From now on, hold no more than that beyond what is needed; its columns are the decoder's."""
        self.own.room = room
        self.cross.room = Room(room.spare_rows)

    def compact(self) -> None:
        """Give back what is held beyond the limit. If it raises, no row has changed."""
        self.own.compact()
        self.cross.compact()

    def start_token(self, config: Any) -> Tensor:
        """What an encoder-decoder's answer starts from, () int64; `config` is a prepared generation config."""
        self.model._prepare_special_tokens(config, True, device=self.device)
        start = config._decoder_start_token_tensor
        first: Tensor = start.reshape(-1)[0]
        return first

    def begin(self, input_ids: Sequence[int], start: Tensor | None = None) -> Prefill:
        """`start` is the decoder's first token, of an encoder-decoder."""
        ids = torch.tensor([list(input_ids)], dtype=torch.long, device=self.device)
        if not self.encodes:
            return Prefill(ids, None, DynamicCache())
        assert start is not None
        return Prefill(start.view(1, 1), ids, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def prefill(self, state: Prefill, max_tokens: int) -> int:
        """Push at most so many tokens of the prompt through the model, alone; returns how many it were.

        What an encoder reads goes through at once: it has no cache that could hold half of it.
        """
        if self.encodes:
            return self._encode(state)
        chunk = state.prompt[:, state.done_tokens : state.done_tokens + max_tokens]
        output = self.model(input_ids=chunk, past_key_values=state.cache, use_cache=True, **self._last_only())
        state.done_tokens += chunk.shape[1]
        if state.done_tokens == state.prompt.shape[1]:
            state.logits = output.logits[0, -1]
        return int(chunk.shape[1])

    def _encode(self, state: Prefill) -> int:
        assert state.encoder_ids is not None
        encoded = self.model.get_encoder()(input_ids=state.encoder_ids)
        output = self.model(
            encoder_outputs=encoded, decoder_input_ids=state.prompt, past_key_values=state.cache, use_cache=True
        )
        state.done_tokens, state.encoded_tokens = state.prompt.shape[1], state.encoder_ids.shape[1]
        state.logits = output.logits[0, -1]
        return state.encoded_tokens

    def join(self, state: Prefill, rows: int = 1) -> None:
        """The sequence takes part in the next step, as so many last rows, which are equal until then.

        What `state` holds is freed on the way. If it raises, the rows are those that were there.
        """
        own = state.cache.self_attention_cache if self.encodes else state.cache
        length = int(state.prompt.shape[1])
        self.own.join(_taken(own), length, rows)
        if self.encodes:
            try:
                self.cross.join(_taken(state.cache.cross_attention_cache), state.encoded_tokens, rows)
            except BaseException:
                for _ in range(rows):
                    self.own.leave(self.own.rows - 1)
                raise
        self.lengths += [length] * rows

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Each target row becomes a copy of its source, a row of the same sequence. If it raises, nothing has changed.

        What was encoded is the same for all rows of a sequence.
        """
        self.own.copy(sources, targets)

    def leave(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        self.own.leave(row)
        if self.encodes:
            self.cross.leave(row)
        last = self.lengths.pop()
        if row < len(self.lengths):
            self.lengths[row] = last

    def clear(self) -> None:
        self.own.clear()
        self.cross.clear()
        self.lengths.clear()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits (n, v) after each row's newest token, (n,), which every row's keys and values then hold."""
        self.own.make_room_for_step()
        ids = torch.tensor(tokens, dtype=torch.long, device=self.device)[:, None]
        positions = torch.tensor(self.lengths, dtype=torch.long, device=self.device)[:, None]
        mask = self.own.mask(self.own.end - self.own.first + 1, self.device)
        output = self._step_both(ids, positions, mask) if self.encodes else self._step(ids, positions, mask)
        self.own.advance()
        self.lengths = [length + 1 for length in self.lengths]
        logits: Tensor = output.logits[:, -1]
        return logits

    def _step(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Any:
        places = {"position_ids": positions} if "position_ids" in self._arguments else {}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.own.cache,
            use_cache=True,
            **places,
            **self._last_only(),
        )

    def _step_both(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Any:
        for layer in self.cross.layers:
            layer.show()
        columns = self.cross.end - self.cross.first
        cache = EncoderDecoderCache(self.own.cache, self.cross.cache)
        # Only its shape is read, since keys and values of what was encoded are in the cache.
        hidden = torch.zeros(1, 1, 1, device=self.device, dtype=self.model.dtype).expand(self.rows, columns, 1)
        assert self._positions is not None
        with self._positions.at(positions):
            return self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                attention_mask=self.cross.mask(columns, self.device),
                decoder_input_ids=ids,
                decoder_attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )

    def _last_only(self) -> dict[str, int]:
        return {"logits_to_keep": 1} if "logits_to_keep" in self._arguments else {}

    def bytes_per_token(self) -> int:
        """Of keys and values in all layers of the decoder, by a look at what a short prompt leaves."""
        start = torch.zeros(1, dtype=torch.long, device=self.device)
        state = self.begin([0], start)
        self.prefill(state, 1)
        cache = state.cache.self_attention_cache if self.encodes else state.cache
        return sum(t.element_size() * t.shape[1] * t.shape[3] for pair in _taken(cache) for t in pair)


class RowPositions:
    """Lets each row of a decoder stand at a position of its own, where the model would give all rows the same.

    For tables of positions in the decoder's own module (BART, Marian and their kin); models with relative positions
    (T5) have none and need nothing. Other threads that use the same model are left alone.
    """

    def __init__(self, model: Any) -> None:
        self._current = threading.local()
        table = getattr(model.get_decoder(), "embed_positions", None)
        if table is not None:
            table.register_forward_pre_hook(self._replace, with_kwargs=True)
            table.register_forward_hook(self._restore)

    def at(self, positions: Tensor) -> RowPositions:
        """A context in which row i stands at `positions[i]`, (n, 1)."""
        self._current.positions = positions
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._current.positions = None

    def _replace(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        positions = getattr(self._current, "positions", None)
        return None if positions is None else (args, {**kwargs, "position_ids": positions[:, 0]})

    def _restore(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        positions = getattr(self._current, "positions", None)
        return None if positions is None else output.reshape(len(positions), 1, -1)


def _taken(cache: Any) -> Iterator[KeysAndValues]:
    """Each layer's keys and values, which the cache holds no more."""
    for layer in cache.layers:
        states = layer.keys, layer.values
        layer.keys = layer.values = None
        yield states


def differs_in_a_batch(model: Any, device: torch.device, tolerance: float) -> str | None:
    """Why sequences of this model cannot be decoded together, or None: some together are compared with each alone."""
    alone = [_probe(model, device, [prompt])[0] for prompt in _PROBES]
    together = _probe(model, device, list(_PROBES))
    scale = max(float(logits.abs().max()) for logits in alone) or 1.0
    error = max(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True)) / scale
    return None if error <= tolerance else f"logits differ by {error:.1e} from those of a sequence alone"


_PROBES = ((5, 7, 9, 11, 13, 6, 8), (9, 4, 12), (10, 3, 5, 7, 4))


class Probe:
    """A prompt of one token and a step, beside all answers under way, which work where anything does."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    def __call__(self) -> None:
        """Raises what the model raises, or ModelFailureError where its logits are no numbers."""
        decoding = self._decoding
        decoding.clear()
        state = decoding.begin([0], torch.zeros(1, dtype=torch.long, device=self._device))
        decoding.prefill(state, 1)
        decoding.join(state)
        if bool(torch.isnan(decoding.step([0])).any()):
            raise ModelFailureError("the model's logits are not numbers")

    @cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self._model, self._device)


def _probe(model: Any, device: torch.device, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each prompt's logits after its first step; they join one by one, and all take part in every step from then on."""
    decoding = Decoding(model, device)
    seen: list[Tensor] = []
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    for prompt in prompts:
        state = decoding.begin([i % size for i in prompt], torch.zeros(1, dtype=torch.long, device=device))
        decoding.prefill(state, len(prompt))
        decoding.join(state)
        seen.append(decoding.step([7 % size] * decoding.rows)[-1].float())
    return seen

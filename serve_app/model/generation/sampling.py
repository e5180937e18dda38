"""The next token of one sequence, as `model.generate` would choose it were the sequence alone (beams: `beams`).

Processors and warpers are transformers' own, built by the model's own method from the generation config; random numbers
come from a generator of the sequence's own, so that a seed gives the tokens that `torch.manual_seed(seed)` followed by
`generate` gives (generation/utils.py, `_sample`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from serve_app.errors import InvalidInputError, ModelFailureError, ServeAppError
from serve_app.model.generation.text import Decoder, text_of
from serve_app.options import GenerationOptions
from serve_app.outputs import TokenLogprob

DEFAULT_NEW_TOKENS = 256
"""Where neither the request nor the model's files say; what transformers' pipelines take."""

GREEDY_BELOW = 1e-30
"""Temperatures below this are greedy: logits divided by it come near the largest float32, and what is not the most
likely token has a chance of 0 long before."""

PENALTIES = (1e-3, 1e3)
"""The repetition penalties that leave finite logits, whatever the temperature."""

_SAME_NAMES = (
    "min_new_tokens",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "min_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "early_stopping",
)


def generation_config(model: Any, options: GenerationOptions, decoder_tokens: int) -> Any:
    """The model's generation config with the request's options; `max_new_tokens` is always set.

    `decoder_tokens` are those that the decoder starts from: the prompt's, or an encoder-decoder's one start token.
    Raises InvalidInputError for values that transformers refuses.
    """
    config = copy.deepcopy(model.generation_config)
    chosen = {name: getattr(options, name) for name in _SAME_NAMES if getattr(options, name) is not None}
    chosen |= _by_tokens(model, options)
    temperature, penalty = options.temperature, options.repetition_penalty
    if temperature is not None and 0 <= temperature < GREEDY_BELOW:
        chosen |= {"do_sample": False, "temperature": 1.0}
    if penalty is not None and not PENALTIES[0] <= penalty <= PENALTIES[1]:
        raise InvalidInputError(f"repetition_penalty: must be {PENALTIES[0]:g} to {PENALTIES[1]:g}")
    try:
        config.update(**chosen, num_return_sequences=1)
        prepared, _ = model._prepare_generation_config(config)
    except ValueError as error:
        raise InvalidInputError(f"options: {error}") from error
    prepared.max_new_tokens = new_tokens(model, options, decoder_tokens)
    return prepared


def _by_tokens(model: Any, options: GenerationOptions) -> dict[str, list[Any]]:
    """Options that name tokens, in transformers' lists. Raises InvalidInputError for tokens that the model has not."""
    named: Mapping[str, Iterable[int]] = {
        "suppress_tokens": options.suppress_tokens,
        "begin_suppress_tokens": options.begin_suppress_tokens,
        "bad_words_ids": chain.from_iterable(options.bad_words_ids),
        "sequence_bias": chain.from_iterable(ids for ids, _ in options.sequence_bias),
    }
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    for name, ids in named.items():
        if max(ids, default=0) >= size:
            raise InvalidInputError(f"{name}: the model has the tokens 0 to {size - 1}, and others are named")
    lists: dict[str, list[Any]] = {
        "suppress_tokens": list(options.suppress_tokens),
        "begin_suppress_tokens": list(options.begin_suppress_tokens),
        "bad_words_ids": [list(ids) for ids in options.bad_words_ids],
        "sequence_bias": [[list(ids), bias] for ids, bias in options.sequence_bias],
    }
    return {name: found for name, found in lists.items() if found}


def new_tokens(model: Any, options: GenerationOptions, decoder_tokens: int) -> int:
    """The limit of new tokens: the request's, else the generation config's, else DEFAULT_NEW_TOKENS.

    Either may say `max_new_tokens`, which wins as in `generate`, or `max_length`, which counts all that the decoder
    holds, and never what an encoder read. Raises InvalidInputError where the request's `max_length` leaves no room for
    an answer.
    """
    own = model.generation_config
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    if own.max_new_tokens is not None:
        return int(own.max_new_tokens)
    if options.max_length is not None:
        if options.max_length <= decoder_tokens:
            raise InvalidInputError(
                f"max_length: {options.max_length} leaves no room for an answer beside the {decoder_tokens} tokens "
                "before it, which it counts; ask for more, or for max_new_tokens"
            )
        return options.max_length - decoder_tokens
    if own.max_length is not None:
        return max(1, int(own.max_length) - decoder_tokens)
    return DEFAULT_NEW_TOKENS


NO_TOKEN = -1
"""The end token of an answer that no token ends: no model has it, and `generate` would put its own for none."""


def set_ends(config: Any, options: GenerationOptions, words: Decoder, special: Collection[int]) -> None:
    """Let the answer end where the request says, too: at its tokens, and at special tokens that are its stop texts.

    Special tokens are left out of the text, in which a stop text is looked for. `config` comes from
    `generation_config`.
    """
    stops = [i for i in map(words.token_to_id, options.stop) if i is not None and i in special]
    if not (options.ignore_eos or options.stop_token_ids or stops):
        return
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    kept = [] if options.ignore_eos else [end for end in own if end is not None]
    config.eos_token_id = [*dict.fromkeys((*kept, *options.stop_token_ids, *stops))] or [NO_TOKEN]


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and, where asked for, its log probability."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What one sequence's tokens are chosen by, and where it ends."""

    processors: Any
    """transformers' LogitsProcessorList."""
    ends: Tensor | None
    """(k,) tokens that end it."""
    limit: int
    """The most new tokens."""
    sample: bool
    random: torch.Generator


def rules_of(model: Any, config: Any, options: GenerationOptions, prompt: Tensor, encoder_ids: Tensor | None) -> Rules:
    """`prompt` (1, p) is what the decoder starts from, `encoder_ids` (1, e) what the encoder read.

    `config` comes from `generation_config`. Raises InvalidInputError for values that transformers refuses.
    """
    device = prompt.device
    config.max_length = prompt.shape[1] + config.max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = prompt.shape[1] + config.min_new_tokens
    model._prepare_special_tokens(config, True, device=device)
    try:
        processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt.shape[1],
            encoder_input_ids=prompt if encoder_ids is None else encoder_ids,  # as `generate` has it
            device=device,
            model_kwargs={},
        )
    except ValueError as error:
        raise InvalidInputError(f"options: {error}") from error
    random = torch.Generator(device)
    random.manual_seed(options.seed) if options.seed is not None else random.seed()
    return Rules(processors, config._eos_token_tensor, int(config.max_new_tokens), bool(config.do_sample), random)


class Sampler:
    """Belongs to one sequence and to the device thread."""

    def __init__(self, rules: Rules, options: GenerationOptions, prompt: Tensor) -> None:
        """`prompt` (1, p) is what the decoder starts from."""
        self._rules = rules
        self.ends = frozenset([] if rules.ends is None else rules.ends.tolist())
        self._ids = prompt.new_empty((1, prompt.shape[1] + rules.limit))
        self._ids[:, : prompt.shape[1]] = prompt
        self._length = prompt.shape[1]
        self._logprobs = options.logprobs

    def choose(self, logits: Tensor, decoder: Decoder) -> Choice:
        """The next token from the model's `logits` (v,). Raises `no_numbers`."""
        rules, raw = self._rules, logits.to(torch.float32)[None]
        scores = rules.processors(self._ids[:, : self._length], raw.clone()) if rules.processors else raw
        chances = scores.softmax(-1) if rules.sample else scores
        if bool(torch.isnan(chances).any()):
            raise no_numbers(raw)
        token = int(self._draw(chances))
        self._ids[0, self._length] = token
        self._length += 1
        if self._logprobs is None:
            return Choice(token)
        return Choice(token, logprob_of(raw[0], token, self._logprobs, decoder))

    def _draw(self, chances: Tensor) -> Tensor:
        if not self._rules.sample:
            return chances.argmax(-1)
        return torch.multinomial(chances, 1, generator=self._rules.random)


def no_numbers(logits: Tensor) -> ServeAppError:
    """ModelFailureError where the model's `logits` are no numbers, else InvalidInputError: the request's options make
    chances of them that are none.
    """
    if bool((torch.isnan(logits) | torch.isposinf(logits)).any()):
        return ModelFailureError("the model's logits for this input are not numbers")
    return InvalidInputError(
        "options: temperature and penalties leave no token a chance that is a number; use values nearer to 1"
    )


def logprob_of(logits: Tensor, token: int, top: int, decoder: Decoder) -> TokenLogprob:
    """Log probabilities under the model itself, before any processor: of `token` and of the `top` likeliest."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    likeliest = tuple(_told(i, value, decoder) for i, value in zip(ids.tolist(), values.tolist(), strict=True))
    return replace(_told(token, float(logprobs[token]), decoder), top=likeliest)


def _told(token: int, logprob: float, decoder: Decoder) -> TokenLogprob:
    text, part = text_of(token, decoder)
    return TokenLogprob(token, text, logprob, part=part)

"""Tiny random models that generate, a tokenizer for them, and what `generate` makes of one prompt alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.engine import GenerationLimits, StepEngine
from serve_app.model.generation.job import GenerationJob
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece
from tests.model.tiny import _COMMON, _OWN
from tests.tokenizer.kinds import byte_level

CPU = torch.device("cpu")
VOCABULARY = 420 + 256
WINDOW = 64

DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "bloom")
ENCODER_DECODERS = ("t5", "mt5", "bart", "marian", "mbart", "pegasus")

LENGTHS = [3, 9, 20, 5, 1, 14, 7, 30]
"""Of prompts that are answered together, in tokens; GREEDY is what each is asked for."""
GREEDY = [GenerationOptions(max_new_tokens=n) for n in (5, 12, 9, 30, 17, 8, 21, 2)]


@cache
def tiny(model_type: str, vocabulary: int = VOCABULARY) -> Any:
    """A random float32 model, with weights large enough that a wrong position or neighbour shows."""
    torch.manual_seed(0)
    sizes = {**_OWN.get(model_type, _COMMON), "vocab_size": vocabulary}
    if model_type == "marian":
        sizes["decoder_vocab_size"] = vocabulary
    config = AutoConfig.for_model(model_type, **sizes)
    cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = cls.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed_positions" not in name:
                weight.normal_(0.0, 0.25)
    return model


@contextmanager
def configured(model: Any, **keys: Any) -> Iterator[None]:
    """The model with these keys in its generation config."""
    before = {key: getattr(model.generation_config, key) for key in keys}
    model.generation_config.update(**keys)
    try:
        yield
    finally:
        model.generation_config.update(**before)


@cache
def tokenizer() -> Tokenizer:
    made = byte_level()
    made.decoder = decoders.ByteLevel()
    return made


def prompts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Token ids, none of the special ones."""
    random = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(5, VOCABULARY, (length,), generator=random).tolist()) for length in lengths]


def engine_of(model: Any, limits: GenerationLimits | None = None, **options: Any) -> StepEngine:
    window = None if getattr(model.config, "model_type", "") in ("t5", "mt5") else WINDOW
    return StepEngine(
        Decoding(model, model.device),
        tokenizer(),
        limits or GenerationLimits(max_kv_tokens=10_000),
        window,
        special=frozenset(range(5)),
        **options,
    )


@asynccontextmanager
async def running(model: Any, limits: GenerationLimits | None = None, **options: Any) -> AsyncIterator[StepEngine]:
    engine = engine_of(model, limits, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def answer(
    engine: StepEngine, prompt: Sequence[int], options: GenerationOptions, **job: Any
) -> list[GeneratedPiece]:
    return [piece async for piece in engine.generate(GenerationJob(tuple(prompt), options, **job))]


def tokens_of(pieces: Sequence[GeneratedPiece]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def text_of(pieces: Sequence[GeneratedPiece]) -> str:
    return "".join(piece.text for piece in pieces)


_OURS = {"seed", "stop", "logprobs", "echo", "prompt_tokens", "source_language", "target_language", "n"}
_OURS |= {"stop_token_ids", "ignore_eos"}
_GENERATE = [field.name for field in fields(GenerationOptions) if field.name not in _OURS]


def listed(value: Any) -> Any:
    """As transformers takes them."""
    return [*map(listed, value)] if isinstance(value, tuple) else value


def reference(model: Any, prompt: Sequence[int], options: GenerationOptions, **ends: Any) -> list[int]:
    """The new tokens of `model.generate`, run alone after `torch.manual_seed`."""
    if options.seed is not None:
        torch.manual_seed(options.seed)
    chosen = {name: listed(getattr(options, name)) for name in _GENERATE if getattr(options, name) not in (None, ())}
    chosen |= ends
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **chosen)[0].tolist()
    tokens: list[int] = output[1 if model.config.is_encoder_decoder else len(prompt) :]
    return tokens

"""Generation on a real GPU: answers made together are what `generate` makes of each prompt alone, on that GPU."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch

from serve_app.errors import OverloadedError, RequestError
from serve_app.model.generation.decoding import differs_in_a_batch
from serve_app.model.generation.engine import GenerationLimits
from serve_app.options import GenerationOptions
from tests.model.generation.models import (
    DECODERS,
    ENCODER_DECODERS,
    GREEDY,
    LENGTHS,
    answer,
    prompts,
    reference,
    running,
    tiny,
    tokens_of,
)

SAMPLED = [
    GenerationOptions(max_new_tokens=5 + 3 * i, do_sample=True, seed=i, temperature=0.6 + i / 5, top_k=(0, 40)[i % 2])
    for i in range(len(LENGTHS))
]


@pytest.fixture(autouse=True)
def full_precision() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


def on_cuda(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(tiny(model_type)).to("cuda", dtype)


@pytest.mark.parametrize("model_type", DECODERS + ENCODER_DECODERS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_answers_that_join_and_leave_at_each_step_are_those_of_generate(
    model_type: str, options: list[GenerationOptions]
) -> None:
    model, asked = on_cuda(model_type), prompts(LENGTHS)
    expected = [reference(model, prompt, own) for prompt, own in zip(asked, options, strict=True)]
    async with running(model) as engine:
        answers = await asyncio.gather(*(answer(engine, p, own) for p, own in zip(asked, options, strict=True)))
        assert engine.active == 0
    assert [tokens_of(each) for each in answers] == expected


async def test_beams_are_those_of_generate() -> None:
    model, asked = on_cuda("bart"), prompts([4, 12])
    options = GenerationOptions(max_new_tokens=12, num_beams=3)
    expected = [reference(model, prompt, options) for prompt in asked]
    async with running(model) as engine:
        answers = await asyncio.gather(*(answer(engine, prompt, options) for prompt in asked))
    assert [tokens_of(each) for each in answers] == expected


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bart"])
def test_half_precision_runs_by_steps(model_type: str) -> None:
    with torch.inference_mode():
        assert differs_in_a_batch(on_cuda(model_type, torch.bfloat16), torch.device("cuda"), 0.05) is None


async def test_memory_that_is_out_fails_the_step_and_not_the_engine() -> None:
    model, asked = on_cuda("llama"), prompts([20] * 4)
    options = GenerationOptions(max_new_tokens=10)
    expected = reference(model, asked[0], options)
    async with running(model, GenerationLimits(max_kv_tokens=100_000)) as engine:
        assert tokens_of(await answer(engine, asked[0], options)) == expected
        hog = _all_but(1 << 20)
        failed = await asyncio.gather(*(answer(engine, p, options) for p in asked), return_exceptions=True)
        del hog
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert all(isinstance(each, (list, RequestError, OverloadedError)) for each in failed)
        assert tokens_of(await answer(engine, asked[0], options)) == expected


def _all_but(free_bytes: int) -> torch.Tensor:
    """Takes what this process may have of the device, which is little from now on."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    limit = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return torch.empty((64 << 20) - free_bytes, dtype=torch.uint8, device="cuda")

"""Models that cannot be batched by steps give `generate`'s own answers, with beams and without."""

from __future__ import annotations

import asyncio

import pytest
import torch

from serve_app.errors import DeadlineExceededError
from serve_app.model.generation.engine import GenerationLimits, StepEngine
from serve_app.model.generation.job import GenerationJob
from serve_app.options import GenerationOptions
from tests.model.generation.models import (
    answer,
    configured,
    prompts,
    reference,
    running,
    tiny,
    tokens_of,
)


async def test_a_model_without_steps_samples_as_generate_does() -> None:
    model, [prompt] = tiny("gpt2"), prompts([9])
    options = GenerationOptions(max_new_tokens=12, do_sample=True, seed=8)
    expected = reference(model, prompt, options)
    async with running(model, by_steps=False) as engine:
        assert tokens_of(await answer(engine, prompt, options)) == expected


async def test_a_limit_of_time_in_the_models_config_counts() -> None:
    model, [prompt] = tiny("gpt2"), prompts([9])
    options = GenerationOptions(max_new_tokens=12)
    with configured(model, max_time=1e-9):
        expected = reference(model, prompt, options)
        async with running(model) as engine:
            assert tokens_of(await answer(engine, prompt, options)) == expected
    assert len(expected) == 1


async def test_a_short_answer_need_not_wait_for_long_ones() -> None:
    """Each the same as alone, those with random numbers too."""
    model, asked = tiny("gpt2"), prompts([5, 7, 9, 4, 6])
    options = [GenerationOptions(max_new_tokens=50, num_beams=3, do_sample=n % 2 == 0, seed=n) for n in range(4)]
    options.append(GenerationOptions(max_new_tokens=2, num_beams=2, do_sample=True, seed=7))
    expected = [reference(model, prompt, own) for prompt, own in zip(asked, options, strict=True)]
    done: list[int] = []

    async def one(engine: StepEngine, index: int) -> list[int]:
        pieces = await answer(engine, asked[index], options[index])
        done.append(index)
        return tokens_of(pieces)

    async with running(model, by_steps=False) as engine:
        long = [asyncio.ensure_future(one(engine, index)) for index in range(4)]
        while engine._whole.active < 4:
            await asyncio.sleep(0)
        short = await one(engine, 4)
        assert done == [4]
        assert [*await asyncio.gather(*long), short] == expected


async def test_random_numbers_of_others_are_left_as_they_were() -> None:
    model, [prompt] = tiny("gpt2"), prompts([5])
    before = torch.get_rng_state()
    async with running(model, by_steps=False) as engine:
        await answer(engine, prompt, GenerationOptions(max_new_tokens=5, num_beams=2, do_sample=True, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


async def test_answers_wait_for_room_in_memory_in_their_order() -> None:
    model, asked = tiny("gpt2"), prompts([10] * 5)
    options = GenerationOptions(max_new_tokens=40, num_beams=2)
    most, ended = 0, []

    async def one(engine: StepEngine, index: int) -> list[int]:
        tokens = tokens_of(await answer(engine, asked[index], options))
        ended.append(index)
        return tokens

    async with running(model, GenerationLimits(max_kv_tokens=2 * 2 * 50), by_steps=False) as engine:
        under_way = asyncio.gather(*(one(engine, index) for index in range(5)))
        while not under_way.done():
            most = max(most, engine._whole.active)
            await asyncio.sleep(0)
    assert await under_way == [reference(model, prompt, options) for prompt in asked]
    assert most == 2
    assert all(abs(place - index) <= 1 for place, index in enumerate(ended))


async def test_answers_that_are_given_up_make_way_at_once() -> None:
    model, asked = tiny("gpt2"), prompts([5] * 5)
    long, short = (GenerationOptions(max_new_tokens=n, num_beams=2) for n in (59, 3))
    async with running(model, GenerationLimits(max_kv_tokens=2 * 2 * 64), by_steps=False) as engine:
        given_up = [asyncio.ensure_future(answer(engine, prompt, long)) for prompt in asked[:4]]
        while engine._whole.active < 2:
            await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        assert tokens_of(await answer(engine, asked[4], short)) == reference(model, asked[4], short)
        assert engine._whole.active <= 1


async def test_a_late_answer_and_one_that_was_given_up_make_way() -> None:
    model, asked = tiny("gpt2"), prompts([5, 5, 5])
    beams = GenerationOptions(max_new_tokens=55, num_beams=2)
    async with running(model, by_steps=False) as engine:
        given_up = asyncio.ensure_future(answer(engine, asked[0], beams))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(DeadlineExceededError):
            async for _ in engine.generate(GenerationJob(asked[1], beams, deadline=0.0)):
                pass
        options = GenerationOptions(max_new_tokens=4, num_beams=2)
        assert tokens_of(await answer(engine, asked[2], options)) == reference(model, asked[2], options)


async def test_an_answer_that_has_no_token_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heavy penalty on length and a narrow choice of tokens can leave nothing but the prompt."""
    model, [prompt] = tiny("gpt2"), prompts([5])
    monkeypatch.setattr(model, "generate", lambda ids, **_: ids)
    async with running(model, by_steps=False) as engine:
        [piece] = await asyncio.wait_for(answer(engine, prompt, GenerationOptions(max_new_tokens=5, num_beams=2)), 30)
    assert (piece.text, piece.token, piece.finish_reason, piece.prompt_tokens) == ("", None, "stop", 5)

"""Beams, and models that cannot be batched by steps, are `generate`'s own answers."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.errors import DeadlineExceededError
from serve_app.model.generation.job import GenerationJob
from serve_app.options import GenerationOptions
from tests.model.generation.models import (
    answer,
    configured,
    prompts,
    reference,
    running,
    text_of,
    tiny,
    tokenizer,
    tokens_of,
)


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "bart", "marian"])
async def test_beams_are_those_of_generate_beside_answers_by_steps(model_type: str) -> None:
    model, asked = tiny(model_type), prompts([7, 12, 5])
    options = [
        GenerationOptions(max_new_tokens=15, num_beams=4),
        GenerationOptions(max_new_tokens=20),
        GenerationOptions(max_new_tokens=10, num_beams=2),
    ]
    expected = [reference(model, prompt, own) for prompt, own in zip(asked, options, strict=True)]
    async with running(model) as engine:
        got = await asyncio.gather(*(answer(engine, p, own) for p, own in zip(asked, options, strict=True)))
    assert [tokens_of(pieces) for pieces in got] == expected
    assert [text_of(pieces) for pieces in got] == [tokenizer().decode(tokens) for tokens in expected]


async def test_the_number_of_beams_is_by_default_the_models_own() -> None:
    model, [prompt] = tiny("t5"), prompts([9])
    options = GenerationOptions(max_new_tokens=12)
    with configured(model, num_beams=3):
        expected = reference(model, prompt, options)
        async with running(model) as engine:
            assert tokens_of(await answer(engine, prompt, options)) == expected


async def test_a_model_without_steps_samples_as_generate_does() -> None:
    model, [prompt] = tiny("gpt2"), prompts([9])
    options = GenerationOptions(max_new_tokens=12, do_sample=True, seed=8)
    expected = reference(model, prompt, options)
    async with running(model, by_steps=False) as engine:
        assert tokens_of(await answer(engine, prompt, options)) == expected


async def test_a_late_answer_and_one_that_was_given_up_make_way() -> None:
    model, asked = tiny("gpt2"), prompts([5, 5, 5])
    beams = GenerationOptions(max_new_tokens=55, num_beams=2)
    async with running(model) as engine:
        given_up = asyncio.ensure_future(answer(engine, asked[0], beams))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(DeadlineExceededError):
            async for _ in engine.generate(GenerationJob(asked[1], beams, deadline=0.0)):
                pass
        options = GenerationOptions(max_new_tokens=4, num_beams=2)
        assert tokens_of(await answer(engine, asked[2], options)) == reference(model, asked[2], options)

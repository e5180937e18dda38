"""What fails, fails alone where it can, and never leaves anybody waiting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from serve_app.errors import InvalidInputError, ModelFailureError, OverloadedError, ServeAppError, UnavailableError
from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.engine import StepEngine
from serve_app.model.generation.sampling import Sampler
from serve_app.model.recovery import Breaker
from serve_app.options import GenerationOptions
from tests.model.generation.models import answer, prompts, reference, running, tiny, tokens_of

OPTIONS = GenerationOptions(max_new_tokens=12)
POISON = 6


class Poisoned:
    """A model that goes wrong where `wrong(input_ids, output)` says; otherwise it is the model."""

    def __init__(self, model: Any, wrong: Any) -> None:
        self._model, self._wrong = model, wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **arguments: Any) -> Any:
        return self._wrong(arguments["input_ids"], self._model(**arguments))


def raise_at_poison(ids: torch.Tensor, output: Any) -> Any:
    if (ids == POISON).any():
        raise RuntimeError("a kernel said no")
    return output


def nan_at_poison(ids: torch.Tensor, output: Any) -> Any:
    output.logits[(ids == POISON).any(1)] = float("nan")
    return output


def out_of_memory(ids: torch.Tensor, output: Any) -> Any:
    raise torch.OutOfMemoryError("no memory")


def raise_in_steps(ids: torch.Tensor, output: Any) -> Any:
    if ids.shape[1] == 1:
        raise RuntimeError("a step failed")
    return output


def healthy_prompts() -> list[tuple[int, ...]]:
    return [tuple(i for i in prompt if i != POISON) for prompt in prompts([5, 9, 7])]


async def outcomes(model: Any, asked: list[tuple[int, ...]]) -> list[Any]:
    async with running(model) as engine:
        return await asyncio.wait_for(
            asyncio.gather(*(answer(engine, prompt, OPTIONS) for prompt in asked), return_exceptions=True), 60
        )


@pytest.mark.parametrize("wrong", [raise_at_poison, nan_at_poison], ids=["raises", "not a number"])
async def test_a_poisoned_prompt_fails_alone(wrong: Any) -> None:
    model, healthy = tiny("llama"), healthy_prompts()
    *fine, poisoned = await outcomes(Poisoned(model, wrong), [*healthy, (7, POISON, 8)])
    assert isinstance(poisoned, ModelFailureError)
    assert [tokens_of(pieces) for pieces in fine] == [reference(model, prompt, OPTIONS) for prompt in healthy]


async def test_no_memory_is_told_as_overload() -> None:
    assert all(
        isinstance(e, OverloadedError)
        for e in await outcomes(Poisoned(tiny("llama"), out_of_memory), healthy_prompts()[: Breaker.SUSPECT_AFTER])
    )


async def test_a_step_that_fails_ends_those_who_took_part_with_an_error() -> None:
    async with running(Poisoned(tiny("llama"), raise_in_steps)) as engine:
        with pytest.raises(ModelFailureError, match="a step failed"):
            await asyncio.wait_for(answer(engine, healthy_prompts()[0], OPTIONS), 60)
        assert engine.active == 0


def raise_always(ids: torch.Tensor, output: Any) -> Any:
    raise RuntimeError("nothing works")


def nan_always(ids: torch.Tensor, output: Any) -> Any:
    output.logits[:] = float("nan")
    return output


def nan_in_steps(ids: torch.Tensor, output: Any) -> Any:
    return nan_always(ids, output) if ids.shape[1] == 1 else output


@pytest.mark.parametrize("wrong", [raise_in_steps, raise_always, nan_always, nan_in_steps])
async def test_a_replica_where_everything_fails_says_so(wrong: Any) -> None:
    prompt = healthy_prompts()[0]
    async with running(Poisoned(tiny("llama"), wrong)) as engine:
        await fail(engine, prompt, Breaker.SUSPECT_AFTER, ModelFailureError)
        engine.check()
        await fail(engine, prompt, Breaker.GIVE_UP_AFTER - 1, UnavailableError)
        with pytest.raises(UnavailableError, match="fails for any input"):
            engine.check()
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(answer(engine, prompt, OPTIONS), 60)


async def test_a_replica_goes_on_where_a_probe_tells_that_the_prompts_were_at_fault() -> None:
    model, healthy = tiny("llama"), healthy_prompts()[0]
    async with running(Poisoned(model, raise_at_poison)) as engine:
        for _ in range(4 * Breaker.GIVE_UP_AFTER):
            await fail(engine, (7, POISON, 8), 1, ModelFailureError)
            engine.check()
        assert tokens_of(await answer(engine, healthy, OPTIONS)) == reference(model, healthy, OPTIONS)


async def test_a_replica_works_again_before_it_is_given_up() -> None:
    model, healthy, working = tiny("llama"), healthy_prompts()[0], []

    def at_first(ids: torch.Tensor, output: Any) -> Any:
        return output if working else raise_always(ids, output)

    async with running(Poisoned(model, at_first)) as engine:
        await fail(engine, healthy, Breaker.SUSPECT_AFTER, ModelFailureError)
        await fail(engine, healthy, 1, UnavailableError)
        working.append(True)
        assert tokens_of(await answer(engine, healthy, OPTIONS)) == reference(model, healthy, OPTIONS)
        engine.check()


async def fail(engine: StepEngine, prompt: tuple[int, ...], times: int, error: type[ServeAppError]) -> None:
    for _ in range(times):
        with pytest.raises(error):
            await asyncio.wait_for(answer(engine, prompt, OPTIONS), 60)


def lose_device(*_: Any, **__: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("place", ["begin", "prefill", "choose", "join", "step", "advance", "copy", "whole answer"])
async def test_a_lost_device_ends_the_replica_wherever_it_shows(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers can be asked of another replica; errors of the device come out where its results are looked at."""
    told: list[str] = []
    options = GenerationOptions(12, num_beams=4) if place in ("advance", "copy") else OPTIONS
    by_steps = place != "whole answer"
    async with running(tiny("llama"), on_broken=lambda: told.append("broken"), by_steps=by_steps) as engine:
        if place == "choose":
            monkeypatch.setattr(Sampler, "choose", lose_device)
        elif place == "advance":
            monkeypatch.setattr("serve_app.model.generation.engine.advance", lose_device)
        elif place == "whole answer":
            monkeypatch.setattr(engine._whole, "_generate", lose_device)
        else:
            monkeypatch.setattr(Decoding, place, lose_device)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(answer(engine, healthy_prompts()[0], options), 60)
        for _ in range(100):
            if told:
                break
            await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError):
            engine.check()
    assert told == ["broken"]


async def test_a_neighbour_goes_on_after_a_failed_step() -> None:
    model, failing = tiny("llama"), {"left": 1}

    def once(ids: torch.Tensor, output: Any) -> Any:
        if ids.shape[1] == 1 and failing["left"]:
            failing["left"] -= 1
            raise RuntimeError("once")
        return output

    async with running(Poisoned(model, once)) as engine:
        first, second = healthy_prompts()[:2]
        with pytest.raises(ModelFailureError):
            await answer(engine, first, OPTIONS)
        assert tokens_of(await answer(engine, second, OPTIONS)) == reference(model, second, OPTIONS)


@pytest.mark.parametrize("temperature", [1e-31, 1e-45, 1e-300])
@pytest.mark.parametrize("beams", [1, 2])
async def test_a_temperature_next_to_nothing_is_greedy(temperature: float, beams: int) -> None:
    model, prompt = tiny("llama"), healthy_prompts()[0]
    wanted = reference(model, prompt, GenerationOptions(max_new_tokens=12, num_beams=beams))
    options = GenerationOptions(12, do_sample=True, temperature=temperature, num_beams=beams)
    async with running(model) as engine:
        assert tokens_of(await answer(engine, prompt, options)) == wanted


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-29])
async def test_a_small_temperature_is_that_of_generate(temperature: float) -> None:
    model, prompt = tiny("llama"), healthy_prompts()[0]
    options = GenerationOptions(12, do_sample=True, seed=1, temperature=temperature, repetition_penalty=1000.0)
    async with running(model) as engine:
        assert tokens_of(await answer(engine, prompt, options)) == reference(model, prompt, options)


@pytest.mark.parametrize("penalty", [1e-300, 1e-4, 1001.0, 1e300])
async def test_a_penalty_that_leaves_no_numbers_is_refused(penalty: float) -> None:
    async with running(tiny("llama")) as engine:
        with pytest.raises(InvalidInputError, match=r"repetition_penalty: must be 0.001 to 1000"):
            await answer(engine, healthy_prompts()[0], GenerationOptions(4, repetition_penalty=penalty))


async def test_options_that_leave_no_numbers_are_the_requests_own_fault(caplog: pytest.LogCaptureFixture) -> None:
    def large(ids: torch.Tensor, output: Any) -> Any:
        output.logits *= 1e12
        return output

    options = GenerationOptions(4, do_sample=True, temperature=1e-29)
    async with running(Poisoned(tiny("llama"), large)) as engine:
        with pytest.raises(InvalidInputError, match="use values nearer to 1"):
            await answer(engine, healthy_prompts()[0], options)
        assert len(tokens_of(await answer(engine, healthy_prompts()[0], GenerationOptions(4)))) == 4
    assert not caplog.records


@pytest.mark.parametrize("num_beams", [1, 2], ids=["by steps", "whole"])
@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "t5", "bart"])
async def test_a_token_that_the_model_does_not_have_is_refused_and_reaches_no_table(
    model_type: str, num_beams: int
) -> None:
    """On a GPU such an id breaks the device, and with it every answer under way."""
    model, options = tiny(model_type), GenerationOptions(max_new_tokens=6, num_beams=num_beams)
    reads = model.get_encoder() if model.config.is_encoder_decoder else model
    table, seen = reads.get_input_embeddings(), list[int]()
    good = prompts([5, 9, 7])
    bad = [(*good[0][:2], table.num_embeddings), (-1, 7)]
    wanted = [reference(model, prompt, options) for prompt in good]
    hook = table.register_forward_pre_hook(lambda module, args: seen.append(int(args[0].max())))
    try:
        async with running(model) as engine:
            asked = [good[0], bad[0], good[1], bad[1], good[2]]
            found = await asyncio.gather(*(answer(engine, ids, options) for ids in asked), return_exceptions=True)
    finally:
        hook.remove()
    assert [type(found[i]) for i in (1, 3)] == [InvalidInputError] * 2
    assert [tokens_of(pieces) for pieces in found if isinstance(pieces, list)] == wanted
    assert max(seen) < table.num_embeddings

"""Answers that are made together are, each, what `generate` makes of its prompt alone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import torch

from serve_app.errors import (
    DeadlineExceededError,
    InputTooLongError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from serve_app.model.generation.decoding import differs_in_a_batch
from serve_app.model.generation.engine import GenerationLimits
from serve_app.model.generation.job import GenerationJob
from serve_app.options import GenerationOptions
from tests.model.generation.models import (
    CPU,
    DECODERS,
    ENCODER_DECODERS,
    GREEDY,
    LENGTHS,
    WINDOW,
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

SAMPLED = [
    GenerationOptions(max_new_tokens=12, do_sample=True, seed=1),
    GenerationOptions(max_new_tokens=25, do_sample=True, seed=2, temperature=0.7),
    GenerationOptions(max_new_tokens=7, do_sample=True, seed=3, top_k=5),
    GenerationOptions(max_new_tokens=18, do_sample=True, seed=4, top_p=0.8),
    GenerationOptions(max_new_tokens=9, do_sample=True, seed=5, temperature=1.5, top_k=40, top_p=0.9),
    GenerationOptions(max_new_tokens=14, repetition_penalty=1.3),
    GenerationOptions(max_new_tokens=20, min_new_tokens=15, do_sample=True, seed=6),
    GenerationOptions(max_new_tokens=4),
]


@pytest.mark.parametrize("model_type", DECODERS + ENCODER_DECODERS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_answers_that_join_and_leave_at_each_step_are_those_of_generate(
    model_type: str, options: list[GenerationOptions]
) -> None:
    model = tiny(model_type)
    asked = prompts(LENGTHS)
    expected = [reference(model, prompt, own) for prompt, own in zip(asked, options, strict=True)]

    async def later(engine: object, index: int) -> list[int]:
        await asyncio.sleep(0.004 * index)
        return tokens_of(await answer(engine, asked[index], options[index]))  # type: ignore[arg-type]

    async with running(model) as engine:
        got = await asyncio.gather(*(later(engine, i) for i in range(len(asked))))
        assert engine.active == 0
    assert list(got) == expected


@pytest.mark.parametrize("model_type", DECODERS + ENCODER_DECODERS)
def test_a_family_is_found_to_be_the_same_in_a_batch(model_type: str) -> None:
    with torch.inference_mode():
        assert differs_in_a_batch(tiny(model_type), CPU, 1e-4) is None


LENGTH_CONFIGS = {
    "max_length": {"max_length": 24},
    "min_length": {"max_length": 40, "min_length": 30},
    "both in new tokens": {"max_new_tokens": 14, "min_new_tokens": 9},
}
LENGTHS_ASKED = {
    "nothing": GenerationOptions(),
    "max_new_tokens": GenerationOptions(max_new_tokens=17),
    "min_new_tokens": GenerationOptions(min_new_tokens=12),
    "beams": GenerationOptions(num_beams=2, min_new_tokens=5),
}


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "bart", "marian"])
@pytest.mark.parametrize("keys", LENGTH_CONFIGS.values(), ids=LENGTH_CONFIGS)
@pytest.mark.parametrize("options", LENGTHS_ASKED.values(), ids=LENGTHS_ASKED)
async def test_lengths_that_the_models_config_names_are_counted_as_generate_counts_them(
    model_type: str, keys: dict[str, int], options: GenerationOptions
) -> None:
    """Where tokens that would end the answer are likely, so that the least number of tokens shows."""
    model, asked = tiny(model_type), prompts([12, 18])
    with configured(model, **keys, eos_token_id=list(range(2, 400))):
        expected = [reference(model, prompt, options) for prompt in asked]
        async with running(model) as engine:
            got = [tokens_of(await answer(engine, prompt, options)) for prompt in asked]
    assert got == expected


async def test_a_long_prompt_goes_through_in_parts_and_its_answer_stays_the_same() -> None:
    model, [prompt] = tiny("llama"), prompts([50])
    options = GenerationOptions(max_new_tokens=10)
    async with running(model, GenerationLimits(10_000, prefill_tokens=7)) as engine:
        assert tokens_of(await answer(engine, prompt, options)) == reference(model, prompt, options)


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "bart"])
async def test_pieces_together_are_the_decoded_answer(model_type: str) -> None:
    async with running(tiny(model_type)) as engine:
        for seed, prompt in enumerate(prompts([4, 8, 15])):
            pieces = await answer(engine, prompt, GenerationOptions(max_new_tokens=40, do_sample=True, seed=seed))
            assert text_of(pieces) == tokenizer().decode(tokens_of(pieces), skip_special_tokens=True)
            assert [p.finish_reason is None for p in pieces] == [True] * (len(pieces) - 1) + [False]
            assert {p.prompt_tokens for p in pieces} == {len(prompt)}


async def test_an_end_token_ends_the_answer() -> None:
    model, [prompt] = tiny("llama"), prompts([6])
    plain = reference(model, prompt, GenerationOptions(max_new_tokens=20))
    with configured(model, eos_token_id=[plain[4], 3]):
        async with running(model) as engine:
            pieces = await answer(engine, prompt, GenerationOptions(max_new_tokens=20))
    assert tokens_of(pieces) == plain[: plain.index(plain[4]) + 1]
    assert pieces[-1].finish_reason == "stop"


async def test_a_stop_text_ends_the_answer_and_is_no_part_of_it() -> None:
    model, [prompt] = tiny("gpt2"), prompts([6])
    options = GenerationOptions(max_new_tokens=40, do_sample=True, seed=3)
    async with running(model) as engine:
        whole = text_of(await answer(engine, prompt, options))
        stop = whole[10:13]
        stopping = GenerationOptions(max_new_tokens=40, do_sample=True, seed=3, stop=(stop, "never there"))
        pieces = await answer(engine, prompt, stopping)
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


async def test_logprobs_are_those_of_the_model_itself() -> None:
    model, [prompt] = tiny("llama"), prompts([6])
    async with running(model) as engine:
        pieces = await answer(engine, prompt, GenerationOptions(max_new_tokens=4, logprobs=3, temperature=None))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens_of(pieces)]])).logits[0, len(prompt) - 1 : -1]
    for piece, expected in zip(pieces, logits.log_softmax(-1), strict=True):
        assert piece.logprob is not None
        assert piece.logprob.token == piece.token
        assert piece.logprob.logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert [top.token for top in piece.logprob.top] == expected.topk(3).indices.tolist()
        assert piece.logprob.text == tokenizer().decode([piece.token], skip_special_tokens=False)


async def test_new_tokens_are_bounded_by_the_window() -> None:
    async with running(tiny("gpt2")) as engine:
        pieces = await answer(engine, prompts([60])[0], GenerationOptions(max_new_tokens=1000))
        assert len(pieces) == WINDOW - 60
        assert pieces[-1].finish_reason == "length"
        with pytest.raises(InputTooLongError, match="64"):
            await answer(engine, prompts([64])[0], GenerationOptions(max_new_tokens=5))


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
async def test_what_can_never_fit_is_refused_and_what_can_waits(model_type: str) -> None:
    model = tiny(model_type)
    options = GenerationOptions(max_new_tokens=20)
    asked = prompts([10] * 6)
    async with running(model, GenerationLimits(max_kv_tokens=70)) as engine:
        with pytest.raises(InputTooLongError, match="70 tokens"):
            await answer(engine, prompts([40])[0], GenerationOptions(max_new_tokens=24, num_beams=2))
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, engine.active)
                await asyncio.sleep(0)

        watching = asyncio.ensure_future(watch())
        got = await asyncio.gather(*(answer(engine, prompt, options) for prompt in asked))
        watching.cancel()
    assert [tokens_of(pieces) for pieces in got] == [reference(model, prompt, options) for prompt in asked]
    assert most <= 2


async def test_a_full_queue_is_told() -> None:
    async with running(tiny("gpt2"), GenerationLimits(70, max_queued_tokens=25)) as engine:
        first = [
            asyncio.ensure_future(answer(engine, p, GenerationOptions(max_new_tokens=50))) for p in prompts([10] * 4)
        ]
        outcomes = await asyncio.gather(*first, return_exceptions=True)
    assert any(isinstance(outcome, OverloadedError) for outcome in outcomes)
    assert any(isinstance(outcome, list) for outcome in outcomes)


async def test_an_empty_queue_takes_even_a_prompt_that_is_larger_than_it() -> None:
    model, [prompt] = tiny("gpt2"), prompts([10])
    async with running(model, GenerationLimits(10_000, max_queued_tokens=5)) as engine:
        got = await answer(engine, prompt, GenerationOptions(max_new_tokens=3))
    assert tokens_of(got) == reference(model, prompt, GenerationOptions(max_new_tokens=3))


async def test_giving_up_frees_the_place_at_once() -> None:
    model, [long, short] = tiny("gpt2"), prompts([5, 5])
    async with running(model, GenerationLimits(10_000, max_sequences=1)) as engine:
        stream = engine.generate(GenerationJob(long, GenerationOptions(max_new_tokens=59)))
        await anext(stream)
        waiting = asyncio.ensure_future(answer(engine, short, GenerationOptions(max_new_tokens=3)))
        await stream.aclose()  # type: ignore[attr-defined]
        assert tokens_of(await waiting) == reference(model, short, GenerationOptions(max_new_tokens=3))
        assert engine.active == 0


async def test_a_caller_that_is_cancelled_gives_up() -> None:
    async with running(tiny("gpt2")) as engine:
        task = asyncio.ensure_future(answer(engine, prompts([5])[0], GenerationOptions(max_new_tokens=59)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [other] = prompts([4])
        await answer(engine, other, GenerationOptions(max_new_tokens=2))
        assert engine.active == 0


async def test_a_late_answer_ends_with_its_deadline() -> None:
    async with running(tiny("gpt2")) as engine:
        with pytest.raises(DeadlineExceededError):
            await answer(engine, prompts([5])[0], GenerationOptions(max_new_tokens=50), deadline=time.monotonic())
        assert engine.active == 0


@pytest.mark.parametrize(
    "options",
    [GenerationOptions(temperature=-1.0, do_sample=True), GenerationOptions(num_beams=2, logprobs=1)],
    ids=["a temperature below zero", "logprobs of beams"],
)
async def test_options_that_make_no_sense_are_the_callers_fault(options: GenerationOptions) -> None:
    async with running(tiny("gpt2")) as engine:
        with pytest.raises(InvalidInputError):
            await answer(engine, prompts([5])[0], options)


async def test_nothing_is_answered_after_the_end() -> None:
    async with running(tiny("gpt2")) as engine:
        stream = engine.generate(GenerationJob(prompts([5])[0], GenerationOptions(max_new_tokens=59)))
        await anext(stream)
    with pytest.raises(UnavailableError):
        async for _ in stream:
            pass
    with pytest.raises(UnavailableError):
        engine.check()


def by_tokens(plain: list[int]) -> dict[str, GenerationOptions]:
    """Options about the tokens of the answer without them."""
    twelve = GenerationOptions(max_new_tokens=12)
    return {
        "suppressed": replace(twelve, suppress_tokens=tuple(plain)),
        "suppressed at first": replace(twelve, begin_suppress_tokens=(plain[0],)),
        "bad words": replace(twelve, bad_words_ids=((plain[2], plain[3]), (600,))),
        "biased": replace(twelve, sequence_bias=(((77,), 50.0), ((77, 78), 100.0))),
        "biased, with beams": GenerationOptions(
            max_new_tokens=8, num_beams=3, sequence_bias=(((plain[0], plain[1]), -9.0), ((plain[0],), 9.0))
        ),
    }


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("kind", by_tokens([0] * 4))
async def test_options_that_name_tokens_are_generates_own(model_type: str, kind: str) -> None:
    model, [prompt] = tiny(model_type), prompts([9])
    plain = reference(model, prompt, GenerationOptions(max_new_tokens=12))
    options = by_tokens(plain)[kind]
    expected = reference(model, prompt, options)
    assert expected != plain
    async with running(model) as engine:
        assert tokens_of(await answer(engine, prompt, options)) == expected


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"])
async def test_tokens_that_the_model_has_not_are_refused(name: str) -> None:
    value = {"bad_words_ids": ((9999,),), "sequence_bias": (((1, 9999), 1.0),)}.get(name, (9999,))
    async with running(tiny("gpt2")) as engine:
        with pytest.raises(InvalidInputError, match=name):
            await answer(engine, prompts([3])[0], GenerationOptions(max_new_tokens=2, **{name: value}))
        assert await answer(engine, prompts([3])[0], GenerationOptions(max_new_tokens=2))


@pytest.mark.parametrize("by_steps", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
async def test_an_answer_ends_at_the_requests_tokens_too(beams: int, by_steps: bool) -> None:
    model, [prompt] = tiny("gpt2"), prompts([9])
    options = GenerationOptions(max_new_tokens=20, num_beams=beams)
    own = reference(model, prompt, options)[12]
    with configured(model, eos_token_id=[own]):
        first = reference(model, prompt, options)
        more = first[3]
        async with running(model, by_steps=by_steps) as engine:

            async def made(**chosen: object) -> list[int]:
                return tokens_of(await answer(engine, prompt, replace(options, **chosen)))  # type: ignore[arg-type]

            assert await made() == first
            assert await made(stop_token_ids=(more,)) == reference(model, prompt, options, eos_token_id=[own, more])
            going_on = replace(options, ignore_eos=True)
            whole = reference(model, prompt, options, eos_token_id=[0])
            assert 0 not in whole
            assert await made(ignore_eos=True) == whole
            assert len(whole) == 20
            assert await made(ignore_eos=True, min_new_tokens=20) == whole
            assert tokens_of(await answer(engine, prompt, replace(going_on, stop_token_ids=(more,)))) == reference(
                model, prompt, options, eos_token_id=[more]
            )


async def test_a_stop_text_that_is_a_special_token_ends_the_answer_at_it() -> None:
    """A special token is not part of the text, in which it could never be found."""
    model, [prompt] = tiny("gpt2"), prompts([9])
    special = tokenizer().id_to_token(4)
    assert special == "<mask>"
    forced = GenerationOptions(max_new_tokens=9, sequence_bias=(((4,), 1000.0),))
    async with running(model) as engine:
        assert tokens_of(await answer(engine, prompt, forced)) == [4] * 9
        pieces = await answer(engine, prompt, replace(forced, stop=(special, "zzz")))
    assert (tokens_of(pieces), text_of(pieces), pieces[-1].finish_reason) == ([4], "", "stop")

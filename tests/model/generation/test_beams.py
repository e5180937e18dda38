"""Beams that are searched in one batch with other answers are, each, what `generate` finds for its prompt alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ModelFailureError, OverloadedError
from serve_app.ingress.generation import CALLS_PER_REQUEST
from serve_app.model.generation.beams import reordered
from serve_app.model.generation.engine import GenerationLimits, StepEngine
from serve_app.model.generation.rectangle import Rectangle
from serve_app.options import GenerationOptions
from tests.model.generation.models import (
    DECODERS,
    ENCODER_DECODERS,
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
from tests.model.generation.test_failures import POISON, Poisoned, healthy_prompts, nan_at_poison

Options = GenerationOptions
LENGTHS = [7, 12, 5, 20, 3, 1, 9, 14]

ASKED: dict[str, list[GenerationOptions]] = {
    "early stopping and penalties": [
        Options(15, num_beams=4),
        Options(20),
        Options(12, num_beams=2, early_stopping=True),
        Options(18, num_beams=3, early_stopping="never", length_penalty=2.0),
        Options(25, num_beams=4, early_stopping=False, length_penalty=0.3),
        Options(9, num_beams=5, length_penalty=-1.0),
        Options(1, num_beams=3),
        Options(14, num_beams=4, early_stopping="never", length_penalty=-0.5),
    ],
    "processors": [
        Options(15, num_beams=4, no_repeat_ngram_size=2),
        Options(12, num_beams=3, repetition_penalty=1.4),
        Options(18, num_beams=2, min_new_tokens=12),
        Options(25, num_beams=4, min_length=20, early_stopping=True),
        Options(14, num_beams=3, encoder_no_repeat_ngram_size=1),
        Options(9, num_beams=2, encoder_repetition_penalty=2.0),
        Options(16, encoder_no_repeat_ngram_size=1),
        Options(20, num_beams=4, no_repeat_ngram_size=3, length_penalty=1.5, early_stopping=True),
    ],
    "sampled": [
        Options(15, num_beams=4, do_sample=True, seed=1),
        Options(12, num_beams=2, do_sample=True, seed=2, temperature=0.7),
        Options(20, num_beams=3, do_sample=True, seed=3, top_k=7),
        Options(9, do_sample=True, seed=4),
        Options(25, num_beams=4, do_sample=True, seed=5, top_p=0.8, early_stopping=True),
        Options(11, num_beams=2, do_sample=True, seed=6, temperature=1.7, renormalize_logits=True),
        Options(14, num_beams=3, do_sample=True, seed=7, repetition_penalty=1.2),
        Options(5, num_beams=4),
    ],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "no end token": {"eos_token_id": None},
    "many end tokens": {"eos_token_id": list(range(2, 80))},
    "forced tokens": {"eos_token_id": [3, 17], "forced_bos_token_id": 9, "forced_eos_token_id": 3},
    "bad words": {"eos_token_id": 3, "bad_words_ids": [[i] for i in range(5, 300)] + [[301, 302]]},
}


async def together(engine: StepEngine, asked: list[tuple[int, ...]], options: list[GenerationOptions]) -> Any:
    return await asyncio.gather(*(answer(engine, p, own) for p, own in zip(asked, options, strict=True)))


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("keys", CONFIGS.values(), ids=CONFIGS)
async def test_beams_are_those_of_generate_whoever_is_beside_them(
    model_type: str, options: list[GenerationOptions], keys: dict[str, Any]
) -> None:
    await compare(model_type, options, keys)


@pytest.mark.parametrize("model_type", sorted({*DECODERS, *ENCODER_DECODERS} - {"gpt2", "t5", "bart"}))
async def test_beams_of_every_family_are_those_of_generate(model_type: str) -> None:
    options = [options for group in ASKED.values() for options in group[:4]]
    await compare(model_type, options, CONFIGS["many end tokens"])


async def compare(model_type: str, options: list[GenerationOptions], keys: dict[str, Any]) -> None:
    model, asked = tiny(model_type), prompts((LENGTHS * 2)[: len(options)])
    with configured(model, **keys):
        expected = [reference(model, prompt, own) for prompt, own in zip(asked, options, strict=True)]
        async with running(model) as engine:
            got = await together(engine, asked, options)
            assert engine._whole.active == engine.held_tokens == 0
    assert [tokens_of(pieces) for pieces in got] == expected
    assert [text_of(pieces) for pieces in got] == [tokenizer().decode(tokens) for tokens in expected]


async def test_the_number_of_beams_is_by_default_the_models_own() -> None:
    model, [prompt] = tiny("t5"), prompts([9])
    options = GenerationOptions(max_new_tokens=12)
    with configured(model, num_beams=3):
        expected = reference(model, prompt, options)
        async with running(model) as engine:
            assert tokens_of(await answer(engine, prompt, options)) == expected


async def test_one_answer_is_given_where_the_models_config_asks_for_several_sequences() -> None:
    model, [prompt] = tiny("gpt2"), prompts([9])
    asked = [GenerationOptions(12, num_beams=3), GenerationOptions(12, num_beams=1)]
    expected = [reference(model, prompt, options) for options in asked]
    with configured(model, num_beams=3, num_return_sequences=3):
        for by_steps in (True, False):
            async with running(model, by_steps=by_steps) as engine:
                assert [tokens_of(await answer(engine, prompt, options)) for options in asked] == expected


@pytest.mark.parametrize("penalty", [-100.0, -40.0, -20.0, 0.0, 40.0])
async def test_a_length_penalty_beyond_reason_ends_the_answer_where_generate_does(penalty: float) -> None:
    """Scores of -1e9 and less are those of what is no beam: `generate` gives up."""
    model, asked = tiny("bart"), prompts([5, 9])
    for early in (True, False, "never"):
        options = GenerationOptions(12, num_beams=2, length_penalty=penalty, early_stopping=early)
        async with running(model) as engine:
            got = [tokens_of(await answer(engine, prompt, options)) for prompt in asked]
        assert got == [reference(model, prompt, options) for prompt in asked]


async def test_a_stop_text_ends_an_answer_of_beams() -> None:
    model, [prompt] = tiny("gpt2"), prompts([6])
    async with running(model) as engine:
        whole = text_of(await answer(engine, prompt, GenerationOptions(40, num_beams=3)))
        stop = whole[10:13]
        pieces = await answer(engine, prompt, GenerationOptions(40, num_beams=3, stop=(stop,)))
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "seed": 1}], ids=["likeliest", "sampled"])
async def test_beams_of_a_poisoned_prompt_fail_alone(beams: int, sampled: dict[str, Any]) -> None:
    model, healthy = tiny("llama"), healthy_prompts()
    options = GenerationOptions(12, num_beams=3)
    async with running(Poisoned(model, nan_at_poison)) as engine:
        poisoned = asyncio.ensure_future(answer(engine, (7, POISON, 8), Options(12, num_beams=beams, **sampled)))
        fine = await together(engine, healthy, [options] * len(healthy))
        with pytest.raises(ModelFailureError, match="not numbers"):
            await poisoned
        assert engine.held_tokens == 0
    assert [tokens_of(pieces) for pieces in fine] == [reference(model, prompt, options) for prompt in healthy]


async def test_beams_that_turn_to_nan_in_the_middle_fail_alone() -> None:
    """One sequence's rows, wherever they have moved to, and no others."""
    model, healthy = tiny("llama"), healthy_prompts()
    options = GenerationOptions(12, num_beams=3)
    poisoned, seen = (9, 8, 7), set[int]()

    def see(ids: torch.Tensor, output: Any) -> Any:
        seen.update(ids.flatten().tolist())
        return output

    async with running(Poisoned(model, see)) as engine:
        await together(engine, healthy, [options] * len(healthy))
    bad = next(token for token in reference(model, poisoned, options)[1:-1] if token not in seen)

    def wrong(ids: torch.Tensor, output: Any) -> Any:
        if ids.shape[1] == 1:
            output.logits[(ids == bad).any(1)] = float("nan")
        return output

    expected = [reference(model, prompt, options) for prompt in healthy]
    async with running(Poisoned(model, wrong)) as engine:
        *fine, error = await asyncio.gather(
            *(answer(engine, prompt, options) for prompt in [*healthy, poisoned]), return_exceptions=True
        )
    assert isinstance(error, ModelFailureError)
    assert [tokens_of(pieces) for pieces in fine] == expected


async def test_beams_that_find_no_memory_to_move_fail_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny("gpt2"), prompts([7, 9, 5])
    beams, greedy = GenerationOptions(20, num_beams=4), GenerationOptions(20)
    copy, failing = Rectangle.copy, [True]

    def copied(self: Rectangle, *rows: Any) -> None:
        if failing and failing.pop():
            raise torch.OutOfMemoryError("no memory")
        copy(self, *rows)

    async with running(model) as engine:
        await answer(engine, asked[0], GenerationOptions(1))
        monkeypatch.setattr(Rectangle, "copy", copied)
        one, other = await asyncio.gather(
            answer(engine, asked[0], beams), answer(engine, asked[1], greedy), return_exceptions=True
        )
        assert isinstance(one, OverloadedError)
        assert not isinstance(other, BaseException)
        assert tokens_of(other) == reference(model, asked[1], greedy)
        assert tokens_of(await answer(engine, asked[2], beams)) == reference(model, asked[2], beams)


@pytest.mark.parametrize("by_steps", [True, False], ids=["by steps", "by generate"])
async def test_many_answers_at_once_are_answered_and_none_refused(by_steps: bool) -> None:
    """A hundred requests, beside one of 2,048 inputs, of which the ingress asks for 64 at a time."""
    model, asked = tiny("bart"), prompts([4] * (100 + CALLS_PER_REQUEST))
    async with running(model, by_steps=by_steps) as engine:
        got = await together(engine, asked, [GenerationOptions(2, num_beams=4)] * len(asked))
    assert all(pieces[-1].finish_reason for pieces in got)


async def test_the_queue_for_generate_is_bounded_by_tokens_as_that_for_steps() -> None:
    model, asked = tiny("gpt2"), prompts([10] * 6)
    limits = GenerationLimits(max_kv_tokens=64, max_queued_tokens=30)
    async with running(model, limits, by_steps=False) as engine:
        outcomes = await asyncio.gather(
            *(answer(engine, prompt, GenerationOptions(50)) for prompt in asked), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert 2 <= len(refused) <= 3
        assert all(isinstance(error, OverloadedError) for error in refused)


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(st.permutations(range(n)), st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    )
)
def test_each_beam_gets_a_row_with_what_its_parent_had(drawn: tuple[list[int], list[int]]) -> None:
    rows, parents = drawn
    new, sources, targets = reordered(rows, parents)
    assert sorted(new) == sorted(rows)
    assert not set(sources) & set(targets)
    assert len(set(targets)) == len(targets) == len(rows) - len(set(parents))
    held = {row: beam for beam, row in enumerate(rows)}
    held |= {target: held[source] for source, target in zip(sources, targets, strict=True)}
    assert [held[row] for row in new] == parents

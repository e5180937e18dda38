"""Rows join and leave in full or not at all, and leave nothing behind for the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from serve_app.errors import OverloadedError
from serve_app.model.generation.decoding import Decoding, Prefill
from serve_app.model.generation.rectangle import Rectangle
from serve_app.options import GenerationOptions
from tests.model.generation.models import CPU, answer, prompts, reference, running, tiny, tokens_of

KINDS = ("gpt2", "t5", "bart")
MOST_ALLOCATIONS = 64
STEPS = 4


@contextmanager
def no_memory_at(number: int) -> Iterator[list[int]]:
    """The allocation of that number within the block fails; the list's item is how many there were."""
    count, new_zeros = [0], torch.Tensor.new_zeros

    def counted(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        count[0] += 1
        if count[0] == number:
            raise torch.OutOfMemoryError("no memory")
        return new_zeros(self, *args, **kwargs)  # type: ignore[arg-type]

    torch.Tensor.new_zeros = counted  # type: ignore[method-assign,assignment]
    try:
        yield count
    finally:
        torch.Tensor.new_zeros = new_zeros  # type: ignore[method-assign]


def filled(decoding: Decoding, prompt: tuple[int, ...]) -> Prefill:
    state = decoding.begin(prompt, torch.zeros(1, dtype=torch.long))
    decoding.prefill(state, len(prompt))
    return state


def steps(decoding: Decoding, count: int = STEPS) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [decoding.step([7] * decoding.rows) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("present", [0, 2], ids=["idle", "busy"])
def test_a_row_that_finds_no_memory_changes_nothing(kind: str, present: int) -> None:
    """Whichever allocation fails, those under way go on with the same numbers, and the row joins when there is room."""
    lengths = (3, 5, 40)
    quiet = Decoding(tiny(kind), CPU)
    with torch.inference_mode():
        first, second, third = (filled(quiet, prompt) for prompt in prompts(lengths))
        for state in (first, second)[:present]:
            quiet.join(state)
        wanted = steps(quiet) if present else []
        quiet.join(third)
        wanted_later = steps(quiet)
    for number in range(1, MOST_ALLOCATIONS):
        decoding = Decoding(tiny(kind), CPU)
        with torch.inference_mode():
            first, second, third = (filled(decoding, prompt) for prompt in prompts(lengths))
            for state in (first, second)[:present]:
                decoding.join(state)
            with no_memory_at(number) as count:
                try:
                    decoding.join(third)
                except torch.OutOfMemoryError:
                    pass
                else:
                    assert count[0] < number
                    break
            assert decoding.rows == decoding.own.rows == present
            got = steps(decoding) if present else []
            decoding.join(filled(decoding, prompts(lengths)[2]))
            later = steps(decoding)
        for mine, right in zip([*got, *later], [*wanted, *wanted_later], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    assert number > len(decoding.own.layers), "every layer's allocations were tried"


async def test_answers_under_way_are_right_whichever_allocation_of_a_joining_prompt_fails() -> None:
    model = tiny("gpt2")
    *early, late = prompts([4, 9, 6, 3, 41])
    options = GenerationOptions(max_new_tokens=16)
    right = [reference(model, prompt, options) for prompt in early]
    for number in (1, 3, 6):
        async with running(model) as engine:
            under_way = [asyncio.create_task(answer(engine, prompt, options)) for prompt in early]
            while len(engine._sequences) < len(early):
                await asyncio.sleep(0.001)
            with no_memory_at(number) as count:
                with pytest.raises(OverloadedError):
                    await answer(engine, late, options)
                assert count[0] >= number
            assert [tokens_of(await task) for task in under_way] == right
            assert tokens_of(await answer(engine, early[3], options)) == right[3]


def states(length: int, value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((1, 2, length, 4), value), torch.full((1, 2, length, 4), value))]


@pytest.mark.parametrize("left", [0, 1, 2])
def test_what_is_no_number_does_not_outlive_its_row(left: int) -> None:
    """Attention multiplies masked columns by 0, and 0 times NaN is NaN."""
    rectangle = Rectangle()
    rectangle.join(states(6, float("nan") if left == 0 else 1.0), 6)
    rectangle.join(states(6, float("nan") if left == 1 else 1.0), 6)
    rectangle.join(states(6, float("nan") if left == 2 else 1.0), 6)
    rectangle.leave(left)
    rectangle.join(states(3, 2.0), 3)
    for layer in rectangle.layers:
        layer.show()
        assert torch.isfinite(layer.keys).all()
        assert torch.isfinite(layer.values).all()

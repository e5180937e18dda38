"""A step that does not end is told, and nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from serve_app.errors import UnavailableError
from serve_app.model.watchdog import Watchdog
from serve_app.options import GenerationOptions
from tests.model.generation.models import answer, prompts, reference, running, tiny, tokens_of

OPTIONS = GenerationOptions(max_new_tokens=12)


class Held:
    """A model that can be held in the middle of a forward."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.go, self.entered = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **arguments: Any) -> Any:
        self.hold()
        return self._model(**arguments)

    def generate(self, *inputs: Any, **arguments: Any) -> Any:
        self.hold()
        return self._model.generate(*inputs, **arguments)

    def hold(self) -> None:
        self.entered.set()
        assert self.go.wait(30)


BY_STEPS = pytest.mark.parametrize("by_steps", [True, False], ids=["steps", "generate"])


@BY_STEPS
async def test_answers_that_wait_for_a_step_that_hangs_fail_so_that_another_replica_can_be_asked(
    by_steps: bool,
) -> None:
    model, now, asked = tiny("llama"), [0.0], prompts([5, 9])
    held = Held(model)
    async with running(held, watchdog=Watchdog(max_s=30, clock=lambda: now[0]), by_steps=by_steps) as engine:
        answers = [asyncio.create_task(answer(engine, prompt, OPTIONS)) for prompt in asked]
        assert await asyncio.to_thread(held.entered.wait, 10)
        engine.check()
        now[0] = 31.0
        with pytest.raises(UnavailableError, match="does not answer"):
            engine.check()
        for one in answers:
            with pytest.raises(UnavailableError, match="does not answer"):
                await asyncio.wait_for(one, 10)
        with pytest.raises(UnavailableError, match="does not answer"):
            await answer(engine, asked[0], OPTIONS)
        held.go.set()
        for _ in range(1000):
            if not engine._watchdog.hangs:
                break
            await asyncio.sleep(0.01)
        assert tokens_of(await answer(engine, asked[0], OPTIONS)) == reference(model, asked[0], OPTIONS)


@BY_STEPS
async def test_closing_does_not_wait_for_a_step_that_hangs(by_steps: bool) -> None:
    now, held = [0.0], Held(tiny("llama"))
    async with running(held, watchdog=Watchdog(max_s=30, clock=lambda: now[0]), by_steps=by_steps) as engine:
        one = asyncio.create_task(answer(engine, prompts([5])[0], OPTIONS))
        assert await asyncio.to_thread(held.entered.wait, 10)
        now[0] = 31.0
        await asyncio.wait_for(asyncio.to_thread(engine.close), 10)
        held.go.set()
        with pytest.raises(UnavailableError):
            await one


async def test_an_engine_without_work_is_told_so() -> None:
    idle = threading.Event()
    async with running(tiny("llama"), on_idle=idle.set):
        assert await asyncio.to_thread(idle.wait, 10)

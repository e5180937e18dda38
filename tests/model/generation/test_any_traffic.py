"""Whatever is asked, given up or fails: right answers, failures only of those hit, memory as counted, nobody starved.

The engine's turns are made by the test itself, so that each example is the same whenever it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from serve_app.errors import DeadlineExceededError, ServeAppError, UnavailableError
from serve_app.model.generation.answering import Answering
from serve_app.model.generation.engine import GenerationLimits
from serve_app.model.generation.job import GenerationJob
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece
from tests.model.generation.models import engine_of, prompts, reference, tiny

PROMPTS = prompts([1, 4, 9, 17, 30])
OPTIONS = [
    GenerationOptions(1),
    GenerationOptions(6),
    GenerationOptions(25),
    GenerationOptions(10, do_sample=True, seed=3),
    GenerationOptions(1, num_beams=3),
    GenerationOptions(8, num_beams=2),
    GenerationOptions(20, num_beams=4, early_stopping=True, no_repeat_ngram_size=2),
    GenerationOptions(9, num_beams=3, do_sample=True, seed=5),
]
LIMITS = [
    GenerationLimits(max_kv_tokens=260, max_sequences=6, prefill_tokens=16),
    GenerationLimits(max_kv_tokens=900, max_sequences=6, prefill_tokens=16),
    GenerationLimits(max_kv_tokens=20_000, max_sequences=5, prefill_tokens=512),
]
NO_MEMORY = torch.OutOfMemoryError("no memory")


@cache
def expected(kind: str, prompt: int, options: int) -> list[int]:
    return reference(tiny(kind), PROMPTS[prompt], OPTIONS[options])


@dataclass(eq=False)
class Asked:
    answering: Answering
    expected: list[int]
    turns: int
    """In which it must have ended."""
    pieces: list[GeneratedPiece]
    error: ServeAppError | None = None
    may_fail: bool = False

    @property
    def ended(self) -> bool:
        return self.error is not None or bool(self.pieces and self.pieces[-1].finish_reason)


class AtOnce:
    """An event loop that calls at once what is handed over to it."""

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)


class AnyTraffic(RuleBasedStateMachine):
    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_per_token = _bytes_per_token(self.kind)
        self.asked: list[Asked] = []
        self.in_danger: list[Answering] = []
        self.allocations_left = 0
        self.start(LIMITS[0])

    def start(self, limits: GenerationLimits) -> None:
        self.engine = engine_of(tiny(self.kind), limits)
        self.engine._loop = AtOnce()  # type: ignore[assignment]
        self._watch()

    def _watch(self) -> None:
        """Note who is hit where something fails."""
        engine = self.engine
        begin, join, search = engine._make_way, engine._join, engine._advances
        choose_first, choose = engine._choose_first, engine._choose
        prefill, step, copy = engine._decoding.prefill, engine._decoding.step, engine._decoding.copy

        def prefilling(state: Any, max_tokens: int) -> int:
            with self.endangering([engine._filling[0].answering]):
                return prefill(state, max_tokens)

        def stepping(tokens: list[int]) -> torch.Tensor:
            with self.endangering([sequence.answering for sequence in engine._sequences]):
                return step(tokens)

        def copying(*rows: Any) -> None:
            with self.endangering([sequence.answering for sequence in engine._sequences if len(sequence.rows) > 1]):
                copy(*rows)

        def beginning(answering: Answering) -> None:
            with self.endangering([answering]):
                begin(answering)

        def joining(sequence: Any, filled: Any) -> None:
            with self.endangering([sequence.answering]):
                join(sequence, filled)

        def choosing_first(sequence: Any, logits: torch.Tensor) -> None:
            with self.endangering([sequence.answering]):
                choose_first(sequence, logits)

        def choosing(sequence: Any, sampler: Any, logits: torch.Tensor) -> None:
            with self.endangering([sequence.answering]):
                choose(sequence, sampler, logits)

        def searching(logits: torch.Tensor) -> Any:
            with self.endangering([sequence.answering for sequence in engine._sequences if len(sequence.rows) > 1]):
                return search(logits)

        engine._make_way, engine._join, engine._advances = beginning, joining, searching  # type: ignore[method-assign]
        engine._choose_first, engine._choose = choosing_first, choosing  # type: ignore[method-assign]
        engine._decoding = _Watched(  # type: ignore[assignment]
            engine._decoding, prefill=prefilling, step=stepping, copy=copying
        )

    @contextmanager
    def endangering(self, answers: list[Answering]) -> Iterator[None]:
        self.in_danger = answers
        try:
            yield
        finally:
            self.in_danger = []

    def hit(self) -> None:
        for one in self.asked:
            one.may_fail |= one.answering in self.in_danger

    # --- what happens

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), options=st.integers(0, len(OPTIONS) - 1))
    def ask(self, prompt: int, options: int) -> None:
        job = GenerationJob(PROMPTS[prompt], OPTIONS[options], deadline=float("inf"))
        try:
            answering = self.engine._checked(job)
        except ServeAppError:
            return  # it is too long for these limits
        received: Any = asyncio.Queue()
        self.engine._pieces[answering] = received
        ahead = sum(one.turns for one in self.asked if not one.ended)
        turns = ahead + len(PROMPTS[prompt]) // 16 + int(answering.config.max_new_tokens) + 3
        self.asked.append(Asked(answering, expected(self.kind, prompt, options), turns, []))
        self.engine._submit(answering)

    @rule(turns=st.integers(1, 6))
    def go_on(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    def turn(self) -> None:
        for one in self.asked:
            one.turns -= not one.ended
        try:
            with torch.inference_mode():
                self.engine._turn()
        except Exception as error:
            self.engine._break(error)
            self.engine._end_all(UnavailableError("it is ending", retry_after_s=1.0))
        self.receive()
        self.memory_is_as_counted()

    def receive(self) -> None:
        for one in self.asked:
            queue = self.engine._pieces.get(one.answering)
            while queue is not None and not queue.empty():
                item = queue.get_nowait()
                assert not one.ended, "nothing comes after the end"
                if isinstance(item, ServeAppError):
                    one.error = item
                else:
                    one.pieces.append(item)

    @precondition(lambda self: self.under_way())
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.under_way()))
        one.answering.abandoned = True
        self.asked.remove(one)

    @precondition(lambda self: self.under_way())
    @rule(data=st.data())
    def be_late(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.under_way()))
        object.__setattr__(one.answering.job, "deadline", 0.0)
        self.turn()
        assert isinstance(one.error, DeadlineExceededError)
        self.asked.remove(one)

    @rule(number=st.integers(1, 40))
    def find_no_memory(self, number: int) -> None:
        """The allocation of that number fails, if a turn makes so many."""
        with no_memory_at(number, self.hit):
            self.turn()

    @precondition(lambda self: self.engine._sequences)
    @rule(data=st.data())
    def turn_to_nan(self, data: st.DataObject) -> None:
        """One row's newest values are no numbers from now on, which the next step shows."""
        row = data.draw(st.integers(0, self.engine._decoding.rows - 1))
        box = self.engine._decoding.own
        with torch.inference_mode():
            for layer in box.layers:
                layer._view(box.end)[1][row, :, -1] = float("nan")
        for one in self.asked:
            one.may_fail |= one.answering is self.engine._owners[row].answering
        self.turn()

    @rule()
    def fail_in_the_model(self) -> None:
        """Of all that a turn computes, the first forward pass fails."""
        with failing_forward(tiny(self.kind), self.hit):
            self.turn()

    @rule(limits=st.sampled_from(LIMITS))
    def reconfigure(self, limits: GenerationLimits) -> None:
        if not self.under_way():
            self.engine.limits = limits

    def under_way(self) -> list[Asked]:
        return [one for one in self.asked if not one.ended]

    # --- what must hold

    def memory_is_as_counted(self) -> None:
        decoding, counted = self.engine._decoding, self.engine.held_tokens
        tensors = [t for box in (decoding.own, decoding.cross) for layer in box.layers for t in layer.store]
        for sequence in self.engine._filling:
            tensors += tensors_of(sequence.prefill.cache) if sequence.prefill is not None else []
        held = sum(t.numel() * t.element_size() for t in tensors)
        assert counted * self.bytes_per_token - 2 * self.bytes_per_token < held <= counted * self.bytes_per_token
        assert counted <= self.engine.limits.max_kv_tokens
        assert all(sequence.prefill is None for sequence in self.engine._sequences)

    @invariant()
    def rows_belong_to_who_has_them(self) -> None:
        engine = self.engine
        assert sorted(row for s in engine._sequences for row in s.rows) == [*range(engine._decoding.rows)]
        assert all(engine._owners[row] is s for s in engine._sequences for row in s.rows)

    @invariant()
    def answers_are_right_and_only_those_hit_fail(self) -> None:
        broken = self.engine._broken is not None
        for one in self.asked:
            assert one.turns > 0 or one.ended, "it starved"
            if one.error is not None:
                assert one.may_fail or broken, one.error
            tokens = [piece.token for piece in one.pieces]
            assert tokens == (one.expected if one.ended and one.error is None else one.expected[: len(tokens)])

    @invariant()
    def the_replica_says_that_it_is_broken_where_the_next_request_would_fail(self) -> None:
        if self.engine._broken is None:
            self.engine.check()
            return
        with pytest.raises(UnavailableError):
            self.engine.check()
        assert not self.under_way(), "nobody waits for a broken replica"
        self.asked.clear()
        self.start(self.engine.limits)

    def teardown(self) -> None:
        while self.under_way():
            self.turn()
            self.answers_are_right_and_only_those_hit_fail()
        self.ask(2, 1)
        while self.under_way():
            self.turn()
        if self.asked:
            assert self.asked[-1].error is None, "check() did not raise"
        self.turn()
        assert self.engine.held_tokens == self.engine.active == self.engine.queued_tokens == 0
        self.engine.close()


class _Watched:
    """A Decoding some of whose methods are others; attributes that are set are the Decoding's own."""

    def __init__(self, decoding: Any, **methods: Any) -> None:
        self.__dict__.update(methods, _decoding=decoding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoding, name)


@contextmanager
def no_memory_at(number: int, hit: Callable[[], None]) -> Iterator[None]:
    count, originals = 0, (torch.Tensor.new_zeros, torch.Tensor.new_empty)

    def failing(original: Any) -> Any:
        def allocate(self: torch.Tensor, *arguments: Any, **keys: Any) -> torch.Tensor:
            nonlocal count
            if self.is_floating_point():  # keys and values
                count += 1
                if count == number:
                    hit()
                    raise NO_MEMORY
            made: torch.Tensor = original(self, *arguments, **keys)
            return made

        return allocate

    torch.Tensor.new_zeros, torch.Tensor.new_empty = map(failing, originals)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.new_zeros, torch.Tensor.new_empty = originals  # type: ignore[method-assign]


@contextmanager
def failing_forward(model: Any, hit: Callable[[], None]) -> Iterator[None]:
    def fail(*_: Any) -> None:
        hook.remove()
        hit()
        raise RuntimeError("a kernel said no")

    hook = model.get_decoder().register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def tensors_of(cache: Any) -> list[torch.Tensor]:
    caches = (cache.self_attention_cache, cache.cross_attention_cache) if hasattr(cache, "is_updated") else (cache,)
    return [t for one in caches for layer in one.layers for t in (layer.keys, layer.values) if t is not None]


@cache
def _bytes_per_token(kind: str) -> int:
    """By hand: layers of the decoder, keys and values of 4 heads of 8 float32 each."""
    layers = {"gpt2": 3, "bart": 1, "t5": 3}[kind]
    return layers * 2 * 4 * 8 * 4


@pytest.mark.parametrize("kind", ["gpt2", "bart", "t5"])
def test_any_traffic_is_answered_as_by_generate(kind: str) -> None:
    machine = type(f"AnyTraffic_{kind}", (AnyTraffic,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=30))

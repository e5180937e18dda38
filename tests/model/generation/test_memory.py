"""Memory for keys and values is held as it is counted, never beyond the budget, and given back."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import ModelConfig, ModelSettings
from serve_app.model import host
from serve_app.model.generating import GeneratingModel
from serve_app.model.generation import loader
from serve_app.model.generation.budget import Extent
from serve_app.model.generation.decoding import Decoding
from serve_app.model.generation.engine import GenerationLimits
from serve_app.model.generation.job import GenerationJob
from serve_app.model.generation.rectangle import SLACK, SPARE_ROWS, Rectangle
from serve_app.options import GenerationOptions
from tests.model.generation.models import CPU, engine_of, prompts, tiny
from tests.model.generation.test_any_traffic import tensors_of
from tests.model.generation.test_loader import saved

HEADS, WIDTH = 4, 8
"""Of all models here."""


def storages() -> dict[int, int]:
    """Bytes of every storage that a tensor shaped as keys and values is alive of, by address."""
    found = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dim() == 4]
    keys_and_values = [t for t in found if t.shape[1] == HEADS and t.shape[3] == WIDTH and t.numel()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in keys_and_values}


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize("max_kv_tokens", [700, 20_000], ids=["little memory", "much memory"])
def test_memory_that_is_counted_is_all_that_is_alive(kind: str, max_kv_tokens: int) -> None:
    """Of old tensors, of prompts that have joined, and of answers that have ended, nothing is left at any turn."""
    model = tiny(kind)
    bytes_per_token = Decoding(model, CPU).bytes_per_token()
    engine = engine_of(model, GenerationLimits(max_kv_tokens, prefill_tokens=8))
    before, most = storages(), 0
    for number, prompt in enumerate(prompts([20, 3, 9, 30, 1, 14])):
        options = GenerationOptions(3 + 4 * number % 13, num_beams=1 + number % 3)
        engine._submit(engine._checked(GenerationJob(prompt, options)))
    with torch.inference_mode():
        while engine.active or engine.queued_tokens:
            engine._turn()
            alive = sum(size for place, size in storages().items() if place not in before)
            assert alive == engine.held_tokens * bytes_per_token
            assert engine.held_tokens <= max_kv_tokens
            most = max(most, engine.held_tokens)
    assert most > 0
    assert engine.held_tokens == 0
    engine.close()


def test_what_a_long_answer_left_behind_makes_way_for_a_prompt() -> None:
    """Tensors are made anew with as many spare rows and columns as the budget has room for at the time."""
    model, most = tiny("llama"), 1098
    engine = engine_of(model, GenerationLimits(most, prefill_tokens=8))
    engine._window = None

    def ask(prompt: int, new: int) -> None:
        engine._submit(engine._checked(GenerationJob(prompts([prompt])[0], GenerationOptions(new))))

    ask(100, 70)
    ask(2, 300)
    with torch.inference_mode():
        while engine.active != 1 or engine._filling:
            engine._turn()
        left, prompt = engine.held_tokens, 480
        assert left + prompt > most
        ask(prompt, 3)
        while engine.active or engine.queued_tokens:
            engine._turn()
            assert engine.held_tokens <= most
    engine.close()


def test_no_more_than_one_layer_is_ever_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rectangle, new_zeros, seen = Rectangle(), torch.Tensor.new_zeros, []
    length, layers = 5, 6

    def states() -> Any:
        return ((torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4)) for _ in range(layers))

    def held() -> int:
        return sum(tensor.numel() for layer in rectangle.layers for tensor in layer.store)

    def watched(self: torch.Tensor, *size: Any, **keys: Any) -> torch.Tensor:
        made = new_zeros(self, *size, **keys)
        seen.append(held() + made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_zeros", watched)
    for _ in range(SPARE_ROWS + 2):
        rectangle.join(states(), length)
    assert max(seen) <= held() * (layers + 1) / layers


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_a_prompt_is_not_held_beside_its_row(kind: str) -> None:
    decoding = Decoding(tiny(kind), CPU)
    with torch.inference_mode():
        state = decoding.begin((5, 6, 7), torch.zeros(1, dtype=torch.long))
        decoding.prefill(state, 3)
        assert tensors_of(state.cache)
        decoding.join(state, rows=2)
    assert not tensors_of(state.cache)


answers = st.builds(
    lambda beams, own, encoded: SimpleNamespace(beams=beams, size=SimpleNamespace(own=own, encoded=encoded)),
    st.integers(1, 8),
    st.integers(2, 500),
    st.integers(0, 500),
)


@given(st.lists(answers, min_size=1, max_size=20), st.integers(0, 5000))
def test_new_tensors_stay_within_the_budget_that_answers_were_admitted_to(asked: list[Any], more: int) -> None:
    extent = Extent.of(asked)
    for tokens in (extent.tokens + more, extent.rows * (extent.own + extent.encoded)):
        room = extent.room(tokens)
        assert extent.own <= room.most_columns <= extent.own + SLACK
        assert (extent.rows + room.spare_rows) * (room.most_columns + extent.encoded) <= tokens


def test_free_memory_is_measured_once_after_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load it is less by what the answers themselves have taken."""
    for name in ("govern_threads", "keep_freed_memory"):  # which are for the whole process
        monkeypatch.setattr(host, name, lambda *_: None)
    free = [4 << 20]
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: free.pop())
    config = ModelConfig(name="tiny", source="./tiny", device="cpu", num_threads=1)
    model = GeneratingModel(saved("gpt2", tmp_path), config, SimpleNamespace())  # type: ignore[arg-type]
    settings = ModelSettings(max_generated_sequences=1000)
    model.reconfigure(settings)
    by_hand = int((4 << 20) * loader.CPU_SHARE / (3 * 2 * HEADS * WIDTH * 4))
    assert model.describe().max_batch_tokens == by_hand
    model.reconfigure(ModelSettings(max_generated_sequences=2))
    assert model.describe().max_batch_tokens == 2 * 2 * 64
    model.reconfigure(settings)
    assert model.describe().max_batch_tokens == by_hand
    model.close()


def test_keys_and_values_of_models_without_steps_are_estimated_from_their_sizes() -> None:
    for kind in ("gpt2", "bart", "t5"):
        assert loader._most_bytes(tiny(kind)) == Decoding(tiny(kind), CPU).bytes_per_token()

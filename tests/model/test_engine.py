"""Calls in, rows out, on one device thread, and nobody waits for ever."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import (
    DeadlineExceededError,
    InputTooLongError,
    ModelFailureError,
    OverloadedError,
    UnavailableError,
)
from serve_app.model.engine import Engine
from serve_app.model.rows import SequenceRows
from serve_app.model.scheduler import Limits
from serve_app.model.watchdog import Watchdog
from serve_app.types import Forget, ForwardCall, MaskArguments, Rows
from tests.model.batches import forward_call, marks_forward, token_batch

LIMITS = Limits(max_batch_tokens=64, max_batch_sequences=16, max_queued_tokens=100_000)


class Model:
    """A fake model that can be held at a barrier and counts what it computed."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.sequences = 0
        self.fail_with: BaseException | None = None

    def __call__(self, head, work):
        batch = work.tokens
        self.entered.set()
        assert self.go.wait(30)
        self.batches.append(int(batch.cu_seqlens[-1]))
        self.sequences += batch.num_sequences
        if self.fail_with is not None:
            raise self.fail_with
        rows = SequenceRows(marks_forward(batch))
        return lambda: rows


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def engine(model: Model):
    made = Engine(model, LIMITS, max_input_tokens=32)
    made.start(asyncio.get_running_loop())
    yield made
    model.go.set()
    made.close()


async def test_every_sequence_gets_its_own_row_in_order(engine: Engine):
    call = forward_call([[5], [7, 9], [1] * 40])
    rows = await engine.submit(call)
    np.testing.assert_array_equal(rows.values, marks_forward(call.tokens))
    assert rows.failures == {}
    assert (rows.forward_s >= 0).all()


async def test_concurrent_calls_do_not_mix(engine: Engine):
    rng = np.random.default_rng(0)
    calls = [forward_call([rng.integers(1, 30, 3).tolist()], rng.integers(0, 1000, 3).tolist()) for _ in range(200)]
    answers = await asyncio.gather(*(engine.submit(call) for call in calls))
    for call, rows in zip(calls, answers, strict=True):
        np.testing.assert_array_equal(rows.values, marks_forward(call.tokens))


async def test_what_arrives_during_a_forward_shares_the_next_one(engine: Engine, model: Model):
    model.go.clear()
    first = asyncio.create_task(engine.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    rest = [asyncio.create_task(engine.submit(forward_call([[4]]))) for _ in range(10)]
    await asyncio.sleep(0.05)
    model.go.set()
    await asyncio.gather(first, *rest)
    assert model.batches == [4, 40]


async def test_a_call_that_goes_first_is_computed_before_what_waits(engine: Engine, model: Model):
    model.go.clear()
    running = asyncio.create_task(engine.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    waits = asyncio.create_task(engine.submit(forward_call([[50]])))
    await asyncio.sleep(0)
    first = asyncio.create_task(engine.submit(replace(forward_call([[20]]), goes_first=True)))
    await asyncio.sleep(0)
    model.go.set()
    await asyncio.gather(running, waits, first)
    assert model.batches == [4, 20, 50]


async def test_a_call_without_sequences_is_answered_without_a_forward(engine: Engine, model: Model):
    rows = await engine.submit(forward_call([[], []]))
    assert len(rows.values) == 0
    assert model.batches == []


async def test_failures_belong_to_their_request_only(engine: Engine, model: Model):
    call = forward_call([[5], [65], [5]])
    rows = await engine.submit(call)
    assert list(rows.failures) == [1]
    assert isinstance(rows.failures[1], InputTooLongError)
    np.testing.assert_array_equal(rows.values[[0, 2]], [[0, 5], [2, 5]])


async def test_a_failing_model_answers_every_request_with_the_failure(engine: Engine, model: Model):
    model.fail_with = ValueError("bad")
    rows = await engine.submit(forward_call([[5], [5, 6]]))
    assert {type(error) for error in rows.failures.values()} == {ModelFailureError}
    assert sorted(rows.failures) == [0, 1]


async def test_an_expired_request_is_not_computed(engine: Engine, model: Model):
    model.go.clear()
    running = asyncio.create_task(engine.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    call = ForwardCall(token_batch([[3], [3]]), "pooled", (0.0, 60.0))
    waiting = asyncio.create_task(engine.submit(call))
    await asyncio.sleep(0.05)
    model.go.set()
    rows = await waiting
    await running
    assert isinstance(rows.failures[0], DeadlineExceededError)
    assert model.batches == [4, 3]


async def test_a_cancelled_call_is_not_computed(engine: Engine, model: Model):
    model.go.clear()
    running = asyncio.create_task(engine.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    doomed = asyncio.create_task(engine.submit(forward_call([[9]] * 5)))
    await asyncio.sleep(0.05)
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    model.go.set()
    await running
    await engine.submit(forward_call([[2]]))
    assert model.batches == [4, 2]


async def test_a_full_queue_refuses_the_request_and_not_its_neighbours(model: Model):
    engine = Engine(model, Limits(64, 16, 100), max_input_tokens=32)
    engine.start(asyncio.get_running_loop())
    model.go.clear()
    running = asyncio.create_task(engine.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    call = asyncio.create_task(engine.submit(forward_call([[60], [60], [10]])))
    await asyncio.sleep(0.05)
    model.go.set()
    rows = await call
    await running
    engine.close()
    assert [type(rows.failures.get(i)) for i in range(3)] == [type(None), OverloadedError, type(None)]


async def test_a_broken_device_fails_the_batch_and_every_later_call(model: Model):
    broken = threading.Event()
    engine = Engine(model, LIMITS, max_input_tokens=32, on_broken=broken.set)
    engine.start(asyncio.get_running_loop())
    model.fail_with = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    rows = await engine.submit(forward_call([[5], [6]]))
    assert {type(error) for error in rows.failures.values()} == {UnavailableError}
    assert await asyncio.to_thread(broken.wait, 10)
    with pytest.raises(UnavailableError, match="broken"):
        engine.check()
    with pytest.raises(UnavailableError):
        await engine.submit(forward_call([[5]]))
    engine.close()


async def test_a_bug_in_the_device_thread_hangs_nobody(model: Model, monkeypatch: pytest.MonkeyPatch):
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))

    def observe(report):
        raise RuntimeError("a bug of ours")

    engine = Engine(model, LIMITS, max_input_tokens=32, observe=observe)
    engine.start(asyncio.get_running_loop())
    model.go.clear()
    first = asyncio.create_task(engine.submit(forward_call([[5]])))
    await asyncio.to_thread(model.entered.wait, 10)
    queued = asyncio.create_task(engine.submit(forward_call([[6]])))
    await asyncio.sleep(0.05)
    model.go.set()
    await asyncio.wait_for(first, 10)
    rows = await asyncio.wait_for(queued, 10)
    assert isinstance(rows.failures[0], UnavailableError)
    engine.close()
    assert [str(error) for error in seen] == ["a bug of ours"]


async def test_closing_answers_what_waits(engine: Engine, model: Model):
    model.go.clear()
    running = asyncio.create_task(engine.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    waiting = asyncio.create_task(engine.submit(forward_call([[5]])))
    await asyncio.sleep(0.05)
    threading.Timer(0.1, model.go.set).start()
    await asyncio.to_thread(engine.close)
    assert (await running).failures == {}
    assert isinstance((await waiting).failures[0], UnavailableError)


async def test_new_limits_apply_from_the_next_batch_on(engine: Engine, model: Model):
    engine.set_limits(Limits(32, 16, 100_000))
    await engine.submit(forward_call([[8] * 8]))
    assert model.batches == [32, 32]


async def test_running_out_of_memory_lowers_the_budget_in_force(model: Model):
    def launch(head, work):
        if work.tokens.cu_seqlens[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: SequenceRows(marks_forward(work.tokens))

    engine = Engine(launch, LIMITS, max_input_tokens=32)
    engine.start(asyncio.get_running_loop())
    call = forward_call([[8] * 8])
    rows = await engine.submit(call)
    np.testing.assert_array_equal(rows.values, marks_forward(call.tokens))
    assert engine.max_batch_tokens == 48
    engine.close()


async def test_with_depth_2_the_next_batch_is_launched_before_the_last_is_collected():
    events: list[str] = []
    go = threading.Event()

    def launch(head, work):
        name = int(work.tokens.input_ids[0])
        events.append(f"launch {name}")

        def collect():
            assert go.wait(30)
            events.append(f"collect {name}")
            return SequenceRows(marks_forward(work.tokens))

        return collect

    engine = Engine(launch, LIMITS, max_input_tokens=64, depth=2)
    calls = [asyncio.create_task(engine.submit(forward_call([[60]], [i]))) for i in range(4)]
    await asyncio.sleep(0)
    engine.start(asyncio.get_running_loop())
    await asyncio.sleep(0.05)
    assert events == ["launch 0", "launch 1"]
    go.set()
    answers = await asyncio.gather(*calls)
    engine.close()
    assert [int(rows.values[0, 0]) for rows in answers] == [0, 1, 2, 3]
    assert events[:4] == ["launch 0", "launch 1", "collect 0", "launch 2"]


async def test_a_device_that_breaks_fails_everything_that_is_on_it():
    def launch(head, work):
        def collect():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        return collect

    engine = Engine(launch, LIMITS, max_input_tokens=64, depth=2)
    calls = [asyncio.create_task(engine.submit(forward_call([[60]], [i]))) for i in range(4)]
    await asyncio.sleep(0)
    engine.start(asyncio.get_running_loop())
    answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
    assert {type(rows.failures[0]) for rows in answers} == {UnavailableError}
    engine.close()


async def test_an_idle_device_is_told_so():
    idle = threading.Event()
    engine = Engine(Model(), LIMITS, max_input_tokens=32, on_idle=idle.set)
    engine.start(asyncio.get_running_loop())
    assert await asyncio.to_thread(idle.wait, 10)
    engine.close()


def ragged_model(head, work):
    """As many rows as tokens: the sequence's mark, and what its request asked for."""
    asked = [0 if one is None else one.top_k for one in work.arguments or [None] * work.tokens.num_sequences]
    values = np.stack([work.tokens.input_ids, np.repeat(asked, work.tokens.lengths())], axis=1).astype(np.float32)
    rows = SequenceRows(values, work.tokens.cu_seqlens.copy())
    return lambda: rows


async def test_ragged_rows_of_requests_that_are_split_over_batches_are_put_together_with_their_arguments():
    engine = Engine(ragged_model, LIMITS, max_input_tokens=32)
    engine.start(asyncio.get_running_loop())
    tokens = token_batch([[20] * 7, [], [3, 1], [64, 2]])
    asked = tuple(MaskArguments(top_k) for top_k in range(4))
    rows = await engine.submit(ForwardCall(tokens, "mask-fill", (None,) * 4, arguments=asked))
    engine.close()
    assert rows.failures == {}
    np.testing.assert_array_equal(rows.cu_rows, tokens.cu_seqlens)
    np.testing.assert_array_equal(rows.values[:, 0], tokens.input_ids)
    np.testing.assert_array_equal(rows.values[:, 1], np.repeat([0, 2, 3], [140, 4, 66]))


async def test_a_request_that_failed_has_no_rows_among_ragged_ones():
    engine = Engine(ragged_model, LIMITS, max_input_tokens=32)
    engine.start(asyncio.get_running_loop())
    rows = await engine.submit(forward_call([[2], [3, 65], [4]]))
    engine.close()
    assert list(rows.failures) == [1]
    assert rows.cu_rows.tolist() == [0, 2, 2, 2, 6]
    assert rows.values[:, 0].tolist() == [0, 0, 3, 3, 3, 3]


async def test_a_whole_coalesced_batch_that_is_cancelled_is_dropped_but_for_what_runs(engine: Engine, model: Model):
    model.go.clear()
    doomed = asyncio.create_task(engine.submit(forward_call([[60], [60, 60], [5]])))
    await asyncio.to_thread(model.entered.wait, 10)
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    model.go.set()
    await engine.submit(forward_call([[2]]))
    assert model.batches == [60, 2]


@pytest.fixture
async def abandoned(model: Model):
    """An engine whose only batch is held, and the tokens that it is told to drop."""
    dropped: list[int] = []
    made = Engine(model, LIMITS, max_input_tokens=64, on_abandoned=dropped.append)
    made.start(asyncio.get_running_loop())
    model.go.clear()
    running = asyncio.create_task(made.submit(forward_call([[4]])))
    await asyncio.to_thread(model.entered.wait, 10)
    yield made, dropped
    model.go.set()
    await running
    made.close()


def named_call(requests: list[list[int]], name: str = "call") -> ForwardCall:
    return replace(forward_call(requests), id=name)


async def started(engine: Engine, call: ForwardCall) -> "asyncio.Task[Rows]":
    task = asyncio.create_task(engine.submit(call))
    await asyncio.sleep(0)
    return task


async def test_forgotten_requests_are_not_computed_and_their_neighbours_get_their_rows(abandoned, model: Model):
    engine, dropped = abandoned
    call = named_call([[3], [5, 5], [7], [9]])
    waiting = await started(engine, call)
    assert engine.forget(Forget("call", (1, 3)))
    assert engine.forget(Forget("call", (3,)))
    model.go.set()
    rows = await waiting
    assert dropped == [19]
    assert model.batches == [4, 10]
    assert sorted(rows.failures) == [1, 3]
    np.testing.assert_array_equal(rows.values[[0, 3]], marks_forward(call.tokens)[[0, 3]])
    assert engine._scheduler.queued_tokens == 0


async def test_a_call_of_which_all_is_forgotten_ends_at_once(abandoned):
    engine, dropped = abandoned
    waiting = await started(engine, named_call([[3], [5]]))
    assert engine.forget(Forget("call", (0, 1)))
    rows = await asyncio.wait_for(waiting, 10)
    assert sorted(rows.failures) == [0, 1]
    assert dropped == [8]


async def test_of_a_request_that_runs_only_what_waits_is_forgotten(model: Model):
    dropped: list[int] = []
    engine = Engine(model, LIMITS, max_input_tokens=64, on_abandoned=dropped.append)
    engine.start(asyncio.get_running_loop())
    model.go.clear()
    call = named_call([[60, 60, 60], [2]])
    waiting = await started(engine, call)
    await asyncio.to_thread(model.entered.wait, 10)
    assert engine.forget(Forget("call", (0,)))
    model.go.set()
    rows = await waiting
    engine.close()
    assert dropped == [120]
    assert model.batches == [60, 2]
    np.testing.assert_array_equal(rows.values[3], marks_forward(call.tokens)[3])


async def test_a_call_that_has_ended_or_never_came_is_not_known(engine: Engine):
    await engine.submit(named_call([[3]]))
    assert not engine.forget(Forget("call", (0,)))
    assert not engine.forget(Forget("", (0,)))
    assert engine._named == {}


async def test_requests_that_the_call_has_no_sequences_of_cannot_be_forgotten(abandoned, model: Model):
    engine, dropped = abandoned
    waiting = await started(engine, named_call([[3], [], [4]]))
    assert engine.forget(Forget("call", (1, 99)))
    model.go.set()
    assert (await waiting).failures == {}
    assert dropped == []


async def test_a_cancelled_call_counts_what_it_leaves(abandoned):
    engine, dropped = abandoned
    waiting = await started(engine, named_call([[9]] * 5))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert dropped == [45]
    assert engine._named == {}


@given(
    lengths=st.lists(st.lists(st.integers(1, 64), max_size=5), min_size=1, max_size=12),
    forgotten=st.lists(st.tuples(st.integers(0, 13), st.booleans()), max_size=12),
    depth=st.integers(1, 2),
)
@settings(max_examples=60)
def test_whatever_is_forgotten_and_whenever_the_others_get_their_own_rows(lengths, forgotten, depth):
    call = named_call(lengths)

    async def run() -> Rows:
        engine = Engine(Model(), LIMITS, max_input_tokens=64, depth=depth)
        engine.start(asyncio.get_running_loop())
        waiting = await started(engine, call)
        for index, pause in forgotten:
            engine.forget(Forget("call", (index,)))
            await asyncio.sleep(0.001 if pause else 0)
        rows = await waiting
        engine.close()
        return rows

    rows = asyncio.run(run())
    assert set(rows.failures) <= {index for index, _ in forgotten}
    expected = marks_forward(call.tokens)
    for index in set(range(len(lengths))) - set(rows.failures):
        where = call.tokens.sequences_of(index)
        assert rows.values[where].tolist() == expected[where].tolist()


async def test_what_waits_for_a_forward_that_hangs_fails_so_that_another_replica_can_be_asked(model: Model):
    now = [0.0]
    engine = Engine(model, LIMITS, max_input_tokens=64, watchdog=Watchdog(max_s=30, clock=lambda: now[0]))
    engine.start(asyncio.get_running_loop())
    model.go.clear()
    calls = [asyncio.create_task(engine.submit(forward_call([[60], [60]])))]
    assert await asyncio.to_thread(model.entered.wait, 10)
    calls.append(await started(engine, forward_call([[7]])))
    now[0] = 30.0
    engine.check()
    now[0] = 30.5
    with pytest.raises(UnavailableError, match="does not answer"):
        engine.check()
    answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
    assert [{type(error) for error in rows.failures.values()} for rows in answers] == [{UnavailableError}] * 2
    assert engine._scheduler.queued_tokens == 0
    with pytest.raises(UnavailableError, match="does not answer"):
        await engine.submit(forward_call([[5]]))
    model.go.set()
    await until_it_answers(engine)
    assert (await engine.submit(forward_call([[5]]))).failures == {}
    assert model.batches == [60, 5]
    engine.close()


async def until_it_answers(engine: Engine) -> None:
    for _ in range(1000):
        with contextlib.suppress(UnavailableError):
            return engine.check()
        await asyncio.sleep(0.01)
    raise AssertionError("it never answers again")


async def test_closing_does_not_wait_for_a_forward_that_hangs(model: Model):
    now = [0.0]
    engine = Engine(model, LIMITS, max_input_tokens=64, watchdog=Watchdog(max_s=30, clock=lambda: now[0]))
    engine.start(asyncio.get_running_loop())
    model.go.clear()
    call = asyncio.create_task(engine.submit(forward_call([[60]])))
    assert await asyncio.to_thread(model.entered.wait, 10)
    now[0] = 31.0
    await asyncio.wait_for(asyncio.to_thread(engine.close), 10)
    assert engine._thread.is_alive()
    model.go.set()
    await call


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_collected_forward_that_hangs_is_found_as_well(depth: int):
    now, go, entered = [0.0], threading.Event(), threading.Event()

    def launch(head, work):
        def collect():
            entered.set()
            assert go.wait(30)
            return SequenceRows(marks_forward(work.tokens))

        return collect

    watchdog = Watchdog(max_s=30, clock=lambda: now[0])
    engine = Engine(launch, LIMITS, max_input_tokens=64, depth=depth, watchdog=watchdog)
    engine.start(asyncio.get_running_loop())
    calls = [asyncio.create_task(engine.submit(forward_call([[60]]))) for _ in range(3)]
    assert await asyncio.to_thread(entered.wait, 10)
    now[0] = 31.0
    with pytest.raises(UnavailableError, match="does not answer"):
        engine.check()
    answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
    assert all(rows.failures for rows in answers)
    go.set()
    engine.close()


async def test_a_replica_for_which_everything_fails_says_so_until_its_probe_works_again(model: Model):
    def probe() -> None:
        if model.fail_with is not None:
            raise model.fail_with

    engine = Engine(model, LIMITS, max_input_tokens=32, probe=probe)
    engine.start(asyncio.get_running_loop())
    model.fail_with = ValueError("bad")
    for _ in range(4):
        assert (await engine.submit(forward_call([[5], [6]]))).failures
    with pytest.raises(UnavailableError, match="fails for any input"):
        engine.check()
    with pytest.raises(UnavailableError, match="fails for any input"):
        await engine.submit(forward_call([[5]]))
    model.fail_with = None
    await until_it_answers(engine)
    assert (await engine.submit(forward_call([[5]]))).failures == {}
    engine.close()

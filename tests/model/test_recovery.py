"""When a forward fails, only the offender pays."""

import numpy as np
import pytest
import torch

from serve_app.errors import InputTooLongError, ModelFailureError, UnavailableError
from serve_app.model.recovery import Breaker, DeviceBrokenError, Recovery, TokenBudget, Work, halfway
from serve_app.model.rows import SequenceRows
from serve_app.types import MaskArguments
from tests.model.batches import immediately, marks_forward, token_batch

POISON = 666


class Fails:
    """Fails above a number of tokens, or where a poisoned sequence is in the batch."""

    def __init__(self, max_tokens: int = 10**9, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.max_tokens, self.error = max_tokens, error
        self.calls: list[int] = []

    def __call__(self, batch):
        tokens = int(batch.cu_seqlens[-1])
        self.calls.append(tokens)
        if tokens > self.max_tokens:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        if POISON in batch.input_ids:
            raise RuntimeError("index out of range in self")
        return marks_forward(batch)


def budget() -> TokenBudget:
    return TokenBudget(bound=1000, floor=100)


def recovery(forward, breaker: Breaker | None = None) -> Recovery:
    return Recovery(immediately(forward), budget(), breaker or Breaker())


@pytest.mark.parametrize("max_tokens", [10, 25, 64, 99, 1000])
def test_out_of_memory_splits_by_tokens_and_keeps_the_order(max_tokens: int):
    batch = token_batch([[10] * 10, [3, 5, 7]])
    forward = Fails(max_tokens)
    outcome = recovery(forward).run(Work(batch))
    np.testing.assert_array_equal(outcome.rows.values, marks_forward(batch))
    assert outcome.failures == {}


def test_the_single_input_that_cannot_fit_is_refused_and_its_neighbours_are_answered():
    batch = token_batch([[10], [80], [10]])
    outcome = recovery(Fails(40)).run(Work(batch))
    assert list(outcome.failures) == [1]
    assert isinstance(outcome.failures[1], InputTooLongError)
    assert "80 tokens" in outcome.failures[1].message
    np.testing.assert_array_equal(outcome.rows.values[[0, 2]], [[0, 10], [2, 10]])


def test_out_of_memory_lowers_the_budget_and_calm_batches_raise_it_again():
    learned = budget()
    Recovery(immediately(Fails(300)), learned, Breaker()).run(Work(token_batch([[100] * 8])))
    low = learned.current
    assert 100 <= low <= 600
    for _ in range(TokenBudget.RECOVER_AFTER * 20):
        learned.held()
    assert low < learned.current == 1000


def test_the_budget_never_excludes_the_longest_input():
    learned = budget()
    for _ in range(50):
        learned.ran_out(10)
    assert learned.current == 100


def test_a_new_bound_keeps_what_was_learned_below_it():
    learned = budget()
    learned.ran_out(400)
    learned.rebound(2000)
    assert learned.current == 300
    fresh = budget()
    fresh.rebound(2000)
    assert fresh.current == 2000


@pytest.mark.parametrize("position", range(9))
def test_a_poisoned_input_fails_alone(position: int):
    marks = [POISON if i == position else i for i in range(9)]
    batch = token_batch([[4]] * 9, marks)
    forward = Fails()
    outcome = recovery(forward).run(Work(batch))
    assert list(outcome.failures) == [position]
    assert isinstance(outcome.failures[position], ModelFailureError)
    good = [i for i in range(9) if i != position]
    np.testing.assert_array_equal(outcome.rows.values[good], marks_forward(batch)[good])
    assert len(forward.calls) <= 2 * 4 + 1, "bisection, not one by one"


def test_rows_that_are_not_finite_fail_alone():
    def forward(batch):
        rows = marks_forward(batch)
        rows[1] = np.nan
        rows[3, 1] = np.inf
        return rows

    ladder = recovery(forward)
    outcome = ladder.run(Work(token_batch([[2]] * 5)))
    assert sorted(outcome.failures) == [1, 3]
    assert np.isfinite(outcome.rows.values[[0, 2, 4]]).all()
    assert ladder.non_finite_rows == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=["accelerator-error", "runtime-error"],
)
def test_a_broken_device_is_not_retried(error: Exception):
    calls = []

    def forward(batch):
        calls.append(batch)
        raise error

    with pytest.raises(DeviceBrokenError):
        recovery(forward).run(Work(token_batch([[4]] * 8)))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),  # of the host: cudaHostAlloc
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
    ],
    ids=["device memory", "cublas", "host memory", "launch configuration"],
)
def test_a_call_that_cuda_refuses_does_not_end_the_replica(error: Exception):
    def forward(batch):
        raise error

    outcome = recovery(forward).run(Work(token_batch([[4]] * 2)))
    assert sorted(outcome.failures) == [0, 1]


def test_failed_passes_leave_no_tensors_alive_while_their_halves_run():
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def forward(batch):
        gc.collect()
        assert not [r for r in alive if r() is not None], "the traceback of the failed pass still holds its tensors"
        activations = torch.zeros(8)
        alive.append(weakref.ref(activations))
        if batch.num_sequences > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return marks_forward(batch)

    outcome = recovery(forward).run(Work(token_batch([[4]] * 4)))
    assert outcome.failures == {}


@pytest.mark.parametrize("lengths", [[1, 1], [100, 1], [1, 100], [5, 5, 5, 100], [100, 5, 5]])
def test_halves_are_never_empty(lengths: list[int]):
    batch = token_batch([lengths])
    assert 1 <= halfway(batch) <= len(lengths) - 1


def test_a_forward_that_fails_only_when_collected_is_split_too():
    """On a GPU kernels run after the launch: out of memory may come late."""

    def launch(work):
        def collect():
            if work.tokens.num_sequences > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return SequenceRows(marks_forward(work.tokens))

        return collect

    batch = token_batch([[4]] * 7)
    outcome = Recovery(launch, budget(), Breaker()).run(Work(batch))
    np.testing.assert_array_equal(outcome.rows.values, marks_forward(batch))


def ragged_forward(batch) -> SequenceRows:
    """As many rows as tokens, each the sequence's mark."""
    return SequenceRows(batch.input_ids[:, None].astype(np.float32), batch.cu_seqlens.copy())


def test_of_ragged_rows_only_those_of_the_offender_fail():
    def launch(work):
        rows = ragged_forward(work.tokens)
        rows.values[6] = np.nan
        return lambda: rows

    outcome = Recovery(launch, budget(), Breaker()).run(Work(token_batch([[3, 2], [1, 4, 2]])))
    assert sorted(outcome.failures) == [3]


def test_ragged_rows_and_arguments_stay_with_their_sequences_when_a_batch_is_split():
    marks = [10, POISON, 30, 40, 50]

    def launch(work):
        assert [asked.top_k for asked in work.arguments] == [
            marks.index(m) for m in dict.fromkeys(work.tokens.input_ids)
        ]
        if POISON in work.tokens.input_ids:
            raise RuntimeError("index out of range in self")
        rows = ragged_forward(work.tokens)
        return lambda: rows

    batch = token_batch([[2, 3], [1, 2, 4]], marks)
    outcome = Recovery(launch, budget(), Breaker()).run(Work(batch, tuple(MaskArguments(i) for i in range(5))))
    assert list(outcome.failures) == [1]
    assert outcome.rows.counts().tolist() == [2, 0, 1, 2, 4]
    assert outcome.rows.select(2, 5).values.ravel().tolist() == [30, 40, 40, 50, 50, 50, 50]


class Replica:
    """Fails for the inputs marked POISON, or for any while it is broken; counts forwards and probes."""

    def __init__(self, how: str = "raises") -> None:
        self.broken, self.how = False, how
        self.forwards = self.probes = 0
        self.breaker = Breaker(self.probe)

    def probe(self) -> None:
        self.probes += 1
        if self.broken:
            raise RuntimeError("a kernel said no")

    def forward(self, batch):
        self.forwards += 1
        rows = marks_forward(batch)
        if self.broken and self.how == "raises":
            raise RuntimeError("a kernel said no")
        if self.broken and self.how == "runs out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if POISON in batch.input_ids:
            raise RuntimeError("index out of range in self")
        return np.full_like(rows, np.nan) if self.broken else rows

    def run(self, lengths: list[int], marks: list[int] | None = None):
        """The outcome of one batch, and the forwards that it took."""
        before = self.forwards
        outcome = recovery(self.forward, self.breaker).run(Work(token_batch([lengths], marks)))
        return outcome, self.forwards - before


@pytest.mark.parametrize("how", ["raises", "runs out of memory"])
def test_a_replica_that_fails_for_any_input_is_found_out_and_stops_splitting(how: str):
    replica = Replica(how)
    replica.broken = True
    forwards = [replica.run([4] * 8)[1] for _ in range(6)]
    assert forwards == [15, 15, 1, 1, 1, 1]
    with pytest.raises(UnavailableError, match=r"fails for any input \(RuntimeError: a kernel said no\)"):
        replica.breaker.check()


@pytest.mark.parametrize("how", ["raises", "makes no numbers"])
def test_a_replica_gives_up_only_when_its_probe_has_failed_several_times(how: str):
    replica = Replica(how)
    replica.broken = True
    for probes in (0, 1, 2):
        outcome, _ = replica.run([4])
        replica.breaker.check()
        assert replica.probes == probes
        assert isinstance(outcome.failures[0], UnavailableError if probes else ModelFailureError)
    replica.run([4])
    with pytest.raises(UnavailableError):
        replica.breaker.check()


def test_when_the_replica_is_at_fault_its_inputs_are_not_told_to_be_shorter():
    replica = Replica("runs out of memory")
    replica.broken = True
    replica.run([4, 4])
    outcome, _ = replica.run([4, 4])
    assert {type(error) for error in outcome.failures.values()} == {UnavailableError}


def test_one_poisoned_input_sent_alone_for_ever_is_no_fault_of_the_replica():
    replica = Replica()
    for _ in range(1000):
        outcome, forwards = replica.run([4], [POISON])
        assert isinstance(outcome.failures[0], ModelFailureError)
        assert forwards == 1
        replica.breaker.check()
    assert not replica.breaker.is_open
    assert replica.probes <= 5 + 1000 / Breaker.MOST_PATIENCE


def test_batches_of_poison_alone_are_bisected_as_ever():
    replica = Replica()
    for _ in range(10):
        assert replica.run([4] * 4, [POISON] * 4)[1] == 7
        replica.breaker.check()
    outcome, _ = replica.run([4] * 4, [POISON, 1, 2, POISON])
    assert sorted(outcome.failures) == [0, 3]


def test_an_input_that_works_ends_all_suspicion():
    replica = Replica()
    for _ in range(100):
        replica.run([4], [POISON])
        replica.run([4, 4], [POISON, 1])
    assert replica.probes == 0


def test_a_replica_that_works_again_answers_all_but_the_poisoned_inputs():
    replica = Replica()
    replica.broken = True
    for _ in range(5):
        replica.run([4] * 3)
    replica.broken = False
    outcome, _ = replica.run([4] * 5, [POISON, 1, 2, POISON, 4])
    assert sorted(outcome.failures) == [0, 3]
    assert {type(error) for error in outcome.failures.values()} == {ModelFailureError}
    np.testing.assert_array_equal(outcome.rows.values[[1, 2, 4]], [[1, 4], [2, 4], [4, 4]])
    replica.breaker.check()


def test_a_probe_that_finds_the_device_lost_ends_the_replica():
    def probe() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    breaker = Breaker(probe)
    breaker.failed()
    with pytest.raises(DeviceBrokenError):
        breaker.failed()

"""The queue: order, budget, nothing lost, nothing twice, nobody starved."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.errors import DeadlineExceededError, InputTooLongError, OverloadedError, UnavailableError
from serve_app.model.scheduler import Job, Limits, Part, Scheduler, finish
from tests.model.batches import job

LIMITS = Limits(max_batch_tokens=100, max_batch_sequences=8, max_queued_tokens=10_000)


def taken(scheduler: Scheduler) -> list[Part]:
    return scheduler.take(timeout_s=0) or []


def test_oldest_first_within_the_token_budget():
    scheduler = Scheduler(LIMITS)
    jobs = [job([40]), job([40]), job([40])]
    for one in jobs:
        scheduler.submit(one)
    assert [part.job for part in taken(scheduler)] == jobs[:2]
    assert [part.job for part in taken(scheduler)] == jobs[2:]


@pytest.mark.parametrize("priority", ["interactive", "bulk"])
def test_what_another_replica_lost_goes_before_what_waits(priority: str):
    scheduler = Scheduler(LIMITS)
    large, later, lost = job([60] * 2), job([40]), job([30], priority=priority, goes_first=True)
    for one in (large, later):
        one.priority = priority
        scheduler.submit(one)
    assert [part.job for part in taken(scheduler)] == [large]
    scheduler.submit(lost)
    assert [part.job for part in taken(scheduler)] == [lost, large]
    assert [part.job for part in taken(scheduler)] == [later]
    assert scheduler.queued_tokens == 0


def test_a_misfit_stays_at_the_front_and_leads_the_next_batch():
    scheduler = Scheduler(LIMITS)
    small, misfit, later = job([60]), job([90]), job([10])
    for one in (small, misfit, later):
        scheduler.submit(one)
    assert [part.job for part in taken(scheduler)] == [small]
    assert [part.job for part in taken(scheduler)] == [misfit, later]


def test_a_job_larger_than_a_batch_is_computed_in_parts_in_order():
    scheduler = Scheduler(LIMITS)
    large = job([30] * 7)
    scheduler.submit(large)
    ranges = []
    while parts := taken(scheduler):
        ranges += [(part.first, part.last) for part in parts]
    assert ranges == [(0, 3), (3, 6), (6, 7)]


def test_a_batch_holds_no_more_sequences_than_its_bound():
    scheduler = Scheduler(LIMITS)
    scheduler.submit(job([1] * 20))
    assert [part.last - part.first for part in taken(scheduler)] == [8]


def test_an_input_larger_than_the_budget_is_refused_at_the_door():
    scheduler = Scheduler(LIMITS)
    with pytest.raises(InputTooLongError, match=r"101 tokens.*at most 100"):
        scheduler.submit(job([5, 101]))
    assert scheduler.queued_tokens == 0


def test_an_input_that_shrunken_limits_exclude_fails_instead_of_blocking_the_queue():
    scheduler = Scheduler(LIMITS)
    long, short = job([90]), job([10])
    scheduler.submit(long)
    scheduler.submit(short)
    scheduler.limits = Limits(50, 8, 10_000)
    assert [part.job for part in taken(scheduler)] == [short]
    assert isinstance(long.error, InputTooLongError)


def test_a_full_queue_refuses_and_an_empty_one_takes_even_a_larger_job():
    scheduler = Scheduler(Limits(100, 8, 150))
    scheduler.submit(job([90, 90]))
    with pytest.raises(OverloadedError) as refused:
        scheduler.submit(job([1]))
    assert refused.value.retry_after_s


def test_an_expired_job_is_failed_and_costs_no_forward():
    scheduler = Scheduler(LIMITS)
    done: list[Job] = []
    late = job([10], deadline=time.monotonic() - 1, on_done=done.append)
    fresh = job([10], deadline=time.monotonic() + 60)
    scheduler.submit(late)
    scheduler.submit(fresh)
    assert [part.job for part in taken(scheduler)] == [fresh]
    assert done == [late]
    assert isinstance(late.error, DeadlineExceededError)


def test_a_cancelled_job_is_never_taken_and_never_answered():
    scheduler = Scheduler(LIMITS)
    answered: list[Job] = []
    gone, stays = job([10], on_done=answered.append), job([10])
    scheduler.submit(gone)
    scheduler.submit(stays)
    scheduler.cancel(gone)
    assert [part.job for part in taken(scheduler)] == [stays]
    finish(gone)
    assert answered == []
    assert scheduler.queued_tokens == 0


def test_cancelling_tells_how_many_tokens_will_never_be_computed():
    scheduler = Scheduler(LIMITS)
    large, waiting = job([60, 60, 60]), job([10])
    scheduler.submit(large)
    scheduler.submit(waiting)
    taken(scheduler)
    assert [scheduler.cancel(one) for one in (large, waiting, large)] == [120, 10, 0]
    assert taken(scheduler) == []
    assert scheduler.queued_tokens == 0


def test_a_job_that_failed_in_one_part_costs_no_further_forward():
    scheduler = Scheduler(LIMITS)
    large = job([60, 60, 60])
    scheduler.submit(large)
    [first] = taken(scheduler)
    finish(first.job, UnavailableError("lost"))
    assert taken(scheduler) == []
    assert scheduler.queued_tokens == 0


def test_jobs_of_different_heads_never_share_a_batch():
    scheduler = Scheduler(LIMITS)
    first, other = job([10], head="a"), job([10], head="b")
    scheduler.submit(first)
    scheduler.submit(other)
    assert [part.job for part in taken(scheduler)] == [first]
    assert [part.job for part in taken(scheduler)] == [other]


def test_interactive_goes_before_bulk_and_bulk_is_not_starved():
    scheduler = Scheduler(LIMITS)
    bulk = job([100], priority="bulk")
    scheduler.submit(bulk)
    order = []
    for _ in range(8):
        scheduler.submit(job([100]))
        order += [part.job for part in taken(scheduler)]
    assert order[0] is not bulk
    assert bulk in order[:4]


def test_closing_fails_what_waits_refuses_what_comes_and_ends_take():
    scheduler = Scheduler(LIMITS)
    waiting = job([10])
    scheduler.submit(waiting)
    scheduler.close()
    assert isinstance(waiting.error, UnavailableError)
    with pytest.raises(UnavailableError):
        scheduler.submit(job([10]))
    assert scheduler.take() is None


def test_take_wakes_up_when_work_arrives():
    scheduler = Scheduler(LIMITS)
    got: list[list[Part] | None] = []
    thread = threading.Thread(daemon=True, target=lambda: got.append(scheduler.take()))
    thread.start()
    one = job([10])
    scheduler.submit(one)
    thread.join(10)
    assert [[part.job for part in parts or []] for parts in got] == [[one]]


class AnyTraffic(RuleBasedStateMachine):
    """Whatever arrives, is cancelled, expires or fails, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(Limits(64, 6, 1000))
        self.accepted: list[Job] = []
        self.computed: dict[Job, list[int]] = {}
        self.answers: list[Job] = []
        self.cancelled: set[Job] = set()
        self.running: list[Part] = []

    @rule(
        lengths=st.lists(st.integers(1, 80), min_size=1, max_size=12),
        priority=st.sampled_from(["interactive", "bulk"]),
        head=st.sampled_from(["a", "a", "a", "b"]),
        expired=st.sampled_from([False, False, False, True]),
    )
    def submit(self, lengths, priority, head, expired):
        deadline = time.monotonic() - 1 if expired else None
        one = job(lengths, priority=priority, head=head, deadline=deadline, on_done=self.answers.append)
        try:
            self.scheduler.submit(one)
        except (InputTooLongError, OverloadedError):
            return
        self.accepted.append(one)
        self.computed[one] = []

    @rule(data=st.data())
    @precondition(lambda self: self.accepted)
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.accepted))
        if one not in self.answers:
            self.scheduler.cancel(one)
            self.cancelled.add(one)

    @rule()
    def take(self):
        self.finish_running(fails=False)
        parts = taken(self.scheduler)
        assert sum(part.num_tokens for part in parts) <= 64
        assert sum(part.last - part.first for part in parts) <= 6
        assert len({part.job.head for part in parts}) <= 1
        for part in parts:
            assert part.job not in self.cancelled
            assert part.job not in self.answers
            self.computed[part.job] += range(part.first, part.last)
        self.running = parts

    @rule(fails=st.booleans())
    def finish_running(self, fails):
        for part in self.running:
            if fails:
                finish(part.job, UnavailableError("lost"))
            elif part.last == part.job.tokens.num_sequences:
                finish(part.job)
        self.running = []

    @invariant()
    def sequences_are_computed_in_order_and_once(self):
        for one, sequences in self.computed.items():
            assert sequences == list(range(one.taken))

    @invariant()
    def nobody_is_answered_twice_or_after_cancelling(self):
        assert len(self.answers) == len(set(self.answers))

    def teardown(self):
        self.finish_running(fails=False)
        for _ in range(10_000):
            if not (parts := taken(self.scheduler)):
                break
            self.running = parts
            for part in parts:
                self.computed[part.job] += range(part.first, part.last)
            self.finish_running(fails=False)
        assert set(self.answers) | self.cancelled >= set(self.accepted), "nothing is lost"
        assert self.scheduler.queued_tokens == 0


TestAnyTraffic = AnyTraffic.TestCase
TestAnyTraffic.settings = settings(max_examples=150, stateful_step_count=40)


@given(st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=100)
def test_bulk_waits_for_no_more_than_a_bounded_number_of_batches(arrivals):
    scheduler = Scheduler(LIMITS)
    bulk = job([100], priority="bulk")
    scheduler.submit(bulk)
    for batch, (length, _) in enumerate(arrivals):
        scheduler.submit(job([length]))
        if any(part.job is bulk for part in taken(scheduler)):
            assert batch < 4
            return
    assert len(arrivals) < 4

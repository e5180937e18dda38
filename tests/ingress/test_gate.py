"""The gate: no waiting while a replica may be idle; what waits goes together, as soon as there is enough of it."""

import asyncio

import pytest

from serve_app.ingress.gate import MOST_HOLD_S, Gate, GateLimits, Group
from serve_app.types import BULK_EVERY, Priority

WIDE = GateLimits(max_groups=2, max_requests=100, max_characters=10_000)


class Batches:
    """Requests that hold their place until their group is told to finish."""

    def __init__(self, limits: GateLimits) -> None:
        self.gate = Gate(limits)
        self.groups: list[Group] = []
        self.let_go: list[tuple[Group, Priority]] = []
        self._done: dict[int, asyncio.Event] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, characters: int = 10, priority: Priority = "interactive") -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._hold(characters, priority))
        self.tasks.append(task)
        return task

    async def _hold(self, characters: int, priority: Priority) -> None:
        async with self.gate.admitted(characters, priority) as group:
            self.let_go.append((group, priority))
            if group not in self.groups:
                self.groups.append(group)
            await self._done.setdefault(id(group), asyncio.Event()).wait()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def start(self) -> None:
        """What the batch function does first."""
        await self.settle()
        for group in self.groups:
            self.gate.seal(group)

    async def finish(self, group: Group) -> None:
        self._done[id(group)].set()
        await self.settle()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def batches(request: pytest.FixtureRequest):
    made = Batches(getattr(request, "param", WIDE))
    yield made
    await made.close()


async def test_a_request_passes_at_once_while_a_slot_is_free(batches: Batches):
    batches.send()
    await batches.start()
    batches.send()
    await batches.start()
    assert len(batches.groups) == 2
    assert batches.gate.waiting == 0


async def test_with_every_slot_busy_requests_wait_and_then_go_as_one_group(batches: Batches):
    for _ in range(2):
        batches.send()
        await batches.start()
    for _ in range(5):
        batches.send()
        await batches.settle()
    assert batches.gate.waiting == 5
    await batches.finish(batches.groups[0])
    assert batches.gate.waiting == 2, "a share of what is outstanding goes; the rest waits for the other slot"
    assert batches.groups[2].requests == 3
    await batches.finish(batches.groups[1])
    assert batches.gate.waiting == 2, "the group before has not become a batch yet, and would take these into it"
    await batches.start()
    await asyncio.sleep(0.05)
    assert batches.gate.waiting == 0
    assert batches.groups[3].requests == 2


@pytest.mark.parametrize("batches", [GateLimits(1, 3, 10_000)], indirect=True)
async def test_a_group_holds_no_more_requests_than_its_bound(batches: Batches):
    batches.send()
    await batches.start()
    for _ in range(7):
        batches.send()
    await batches.settle()
    await batches.finish(batches.groups[0])
    assert batches.groups[1].requests == 3
    assert batches.gate.waiting == 4


@pytest.mark.parametrize("batches", [GateLimits(1, 100, 100)], indirect=True)
async def test_a_group_holds_no_more_characters_than_its_bound_but_always_one_request(batches: Batches):
    batches.send()
    await batches.start()
    for characters in (500, 60, 40, 10):
        batches.send(characters)
    await batches.settle()
    await batches.finish(batches.groups[0])
    assert (batches.groups[1].requests, batches.groups[1].characters) == (1, 500)
    await batches.finish(batches.groups[1])
    assert (batches.groups[2].requests, batches.groups[2].characters) == (2, 100)


async def test_cancelled_waiters_leave_no_trace(batches: Batches):
    for _ in range(2):
        batches.send()
        await batches.start()
    waiting = [batches.send() for _ in range(3)]
    await batches.settle()
    for task in waiting:
        task.cancel()
    await batches.settle()
    assert batches.gate.waiting == 0
    await batches.finish(batches.groups[0])
    await batches.finish(batches.groups[1])
    batches.send()
    await batches.settle()
    assert len(batches.groups) == 3


async def test_a_request_cancelled_as_it_is_let_go_frees_its_slot(batches: Batches):
    for _ in range(2):
        batches.send()
        await batches.start()
    late = batches.send()
    await batches.settle()
    batches._done[id(batches.groups[0])].set()
    batches._done[id(batches.groups[1])].set()
    while batches.gate.waiting:
        await asyncio.sleep(0)
    late.cancel()
    await batches.settle()
    for _ in range(2):
        batches.send()
        await batches.start()
    assert batches.gate.waiting == 0, "both slots are free again"


async def test_wider_limits_apply_to_what_waits_already(batches: Batches):
    for _ in range(2):
        batches.send()
        await batches.start()
    batches.send()
    await batches.settle()
    assert batches.gate.waiting == 1
    batches.gate.set_limits(GateLimits(3, 100, 10_000))
    await batches.settle()
    assert batches.gate.waiting == 0


async def test_nobody_is_overtaken_by_a_later_request(batches: Batches):
    order: list[int] = []
    gate = Gate(GateLimits(1, 1, 10_000))

    async def one(number: int) -> None:
        async with gate.admitted(1):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(one(number) for number in range(50)))
    assert order == list(range(50))


async def test_a_group_of_which_every_waiter_left_is_joined_by_nobody(batches: Batches):
    for _ in range(2):
        batches.send()
        await batches.start()
    late = batches.send()
    await batches.settle()
    late.cancel()  # not yet delivered: the waiter is still in the line when the slots become free
    for group in batches.groups[:2]:
        batches._done[id(group)].set()
    await batches.settle()
    for _ in range(2):
        batches.send()
        await batches.start()
    assert batches.gate.waiting == 0
    batches.send()
    await batches.start()
    assert batches.gate.waiting == 1, "both slots are taken, by groups that hold them"


FOUR = GateLimits(max_groups=4, max_requests=100, max_characters=10_000)


async def hold_up(batches: Batches) -> None:
    """Batches take half a second here, and two of 100 characters are under way."""
    batches.send()
    await batches.start()
    await asyncio.sleep(0.5)
    await batches.finish(batches.groups.pop())
    for _ in range(2):
        batches.send(100)
        await batches.start()


@pytest.mark.parametrize("batches", [FOUR], indirect=True)
async def test_while_half_of_the_slots_are_taken_a_small_request_waits_a_little_for_others(batches: Batches):
    await hold_up(batches)
    batches.send()
    batches.send()
    await batches.settle()
    assert batches.gate.waiting == 2
    await asyncio.sleep(2 * MOST_HOLD_S)
    assert batches.gate.waiting == 0
    assert batches.groups[2].requests == 2


@pytest.mark.parametrize("batches", [FOUR], indirect=True)
async def test_what_has_an_even_share_waits_for_nobody(batches: Batches):
    await hold_up(batches)
    batches.send(100)
    await batches.settle()
    assert batches.gate.waiting == 0
    await batches.start()
    for _ in range(9):
        batches.send(10)
    await batches.settle()
    assert batches.gate.waiting == 9
    batches.send(80)
    await batches.settle()
    assert batches.gate.waiting == 0
    assert batches.groups[3].requests == 10


@pytest.mark.parametrize("batches", [FOUR], indirect=True)
async def test_what_waits_for_others_goes_at_once_when_a_batch_ends(batches: Batches):
    await hold_up(batches)
    batches.send()
    await batches.settle()
    assert batches.gate.waiting == 1
    await batches.finish(batches.groups[0])
    assert batches.gate.waiting == 0


@pytest.mark.parametrize("batches", [FOUR], indirect=True)
async def test_one_that_leaves_while_it_waits_for_others_weighs_nothing_any_more(batches: Batches):
    await hold_up(batches)
    leaving = batches.send(60)
    await batches.settle()
    leaving.cancel()
    batches.send(30)
    await batches.settle()
    assert batches.gate.waiting == 1, "30 of 230 characters are no even share"


FOUR = GateLimits(max_groups=4, max_requests=10, max_characters=10_000)


async def sent_one_by_one(batches: Batches, count: int, priority: Priority) -> None:
    for _ in range(count):
        batches.send(priority=priority)
        await batches.start()


@pytest.mark.parametrize("batches", [FOUR], indirect=True)
async def test_an_interactive_request_goes_at_once_however_many_bulk_ones_there_are(batches: Batches):
    await sent_one_by_one(batches, 20, "bulk")
    bulk = len(batches.groups)
    assert bulk == FOUR.max_groups - 1
    batches.send(priority="interactive")
    await batches.start()
    assert [group.priority for group in batches.groups[bulk:]] == ["interactive"]


@pytest.mark.parametrize("batches", [FOUR], indirect=True)
async def test_a_group_has_requests_of_one_priority(batches: Batches):
    for _ in range(3):
        batches.send(priority="bulk")
        batches.send(priority="interactive")
    while not all(task.done() for task in batches.tasks):
        await batches.start()
        await batches.finish(batches.groups[-1])
    kinds = [(group.priority, priority) for group, priority in batches.let_go]
    assert sorted(kinds) == 3 * [("bulk", "bulk")] + 3 * [("interactive", "interactive")]


@pytest.mark.parametrize("batches", [GateLimits(max_groups=1, max_requests=1, max_characters=100)], indirect=True)
async def test_interactive_requests_go_first_and_bulk_ones_are_not_starved(batches: Batches):
    batches.send()
    await batches.start()
    for _ in range(2 * BULK_EVERY):
        batches.send(priority="bulk")
        batches.send(priority="interactive")
    for _ in range(4 * BULK_EVERY):
        await batches.finish(batches.groups[-1])
        await batches.start()
    gone = [group.priority for group in batches.groups[1:]]
    assert gone[: 2 * BULK_EVERY] == 2 * (["interactive"] * (BULK_EVERY - 1) + ["bulk"])
    assert (gone.count("interactive"), gone.count("bulk")) == (2 * BULK_EVERY, 2 * BULK_EVERY)


@pytest.mark.parametrize("batches", [GateLimits(max_groups=1, max_requests=1, max_characters=100)], indirect=True)
async def test_bulk_requests_alone_have_every_slot_they_need(batches: Batches):
    await sent_one_by_one(batches, 2, "bulk")
    assert len(batches.groups) == 1
    await batches.finish(batches.groups[0])
    assert len(batches.groups) == 2

"""Calls go to the replica with the least work under way, whatever replicas said when calls began."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from serve_app.app import ROUTER
from serve_app.errors import VersionGoneError
from serve_app.ingress import tier
from serve_app.ingress.router import CallNotUnderWayError, LeastOutstandingRouter
from serve_app.types import Forget, ForwardCall, TokenBatch, Version
from tests.ingress.tiers import VERSION

DEPLOYMENT = DeploymentID(name="m-model", app_name="app")


@dataclass
class Replica:
    """As much of a RunningReplica as a router looks at."""

    name: str
    max_ongoing_requests: int = 100
    node_id: str = "node"
    availability_zone: str | None = None
    multiplexed_model_ids: set[str] = field(default_factory=set)
    queue_len: int = 0
    version: Version = VERSION

    @property
    def replica_metadata(self) -> dict[str, str]:
        return asdict(self.version)

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue_len

    def push_proxy_handle(self, handle: Any) -> None:
        pass


class Calls:
    """Sends calls as Serve's handle does: choose, count, and tell the router when one has ended."""

    def __init__(self, router: LeastOutstandingRouter) -> None:
        self._router = router
        self._number = 0

    async def send(
        self, tokens: int, call_id: str = "", internal_id: str = "", version: str = "", is_retry: bool = False
    ) -> tuple[str, str]:
        """(replica's name, Serve's id of the call)"""
        self._number += 1
        internal_id = internal_id or f"call-{self._number}"
        metadata = RequestMetadata(request_id=str(self._number), internal_request_id=internal_id)
        pending = PendingRequest(args=[_call(tokens, call_id, version)], kwargs={}, metadata=metadata)
        replica = await self._router._choose_replica_for_request(pending, is_retry=is_retry)
        self._router.on_send_request(replica.replica_id)
        return replica.replica_id.unique_id, metadata.internal_request_id

    async def taken(self, refusing: Replica, **call: Any) -> tuple[str, str]:
        """As `send`; what `refusing` gets it refuses, and Serve asks the router again."""
        sent, is_retry = await self.send(1, **call), False
        while sent[0] == refusing.name:
            assert not is_retry, "a replica that has said how much it has is not asked again"
            self._router.on_new_queue_len_info(refusing.replica_id, refusing.queue_len)
            self._router.on_request_completed(refusing.replica_id, sent[1])
            sent, is_retry = await self.send(1, is_retry=True, **call), True
        return sent

    def end(self, sent: tuple[str, str], length_when_begun: int) -> None:
        """As over gRPC: first the length that the replica had when the call began, then one less."""
        replica_id = ReplicaID(sent[0], DEPLOYMENT)
        self._router.on_new_queue_len_info(replica_id, length_when_begun)
        self._router.on_request_completed(replica_id, sent[1])
        self._router.decrement_queue_len_cache(replica_id)


def _call(tokens: int, call_id: str, version: str) -> ForwardCall:
    batch = TokenBatch(
        input_ids=np.zeros(tokens, np.int32),
        cu_seqlens=np.array([0, tokens], np.int32),
        cu_requests=np.array([0, 1], np.int32),
        truncated=np.zeros(1, np.bool_),
    )
    return ForwardCall(batch, "pooled", (None,), id=call_id, version=version)


@pytest.fixture(autouse=True)
def _new_view() -> Iterator[None]:
    """A view is of a process; each test is one."""
    yield
    tier._views.pop(DEPLOYMENT, None)


@pytest.fixture
async def router() -> LeastOutstandingRouter:
    return make_router([Replica("a"), Replica("b")])


def make_router(replicas: list[Replica]) -> LeastOutstandingRouter:
    router = LeastOutstandingRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="node",
        self_actor_id="actor",
        self_actor_handle=None,
        use_replica_queue_len_cache=True,
    )
    router.update_replicas(replicas)
    return router


async def test_calls_alternate_while_none_ends(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    names = [(await calls.send(10))[0] for _ in range(8)]
    assert sorted(names) == ["a"] * 4 + ["b"] * 4
    assert all(sorted(names[i : i + 2]) == ["a", "b"] for i in range(0, 8, 2))


async def test_a_call_that_ends_does_not_make_its_replica_look_empty(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    first = await calls.send(10)
    others = [await calls.send(10) for _ in range(5)]
    busy = [sent for sent in others if sent[0] == first[0]]
    calls.end(first, length_when_begun=1)
    assert len(busy) == 2
    assert (await calls.send(10))[0] == first[0], "it has the fewest now"
    names = [(await calls.send(10))[0] for _ in range(6)]
    assert sorted(names) == ["a"] * 3 + ["b"] * 3, "and then they are even"


async def test_calls_are_weighed_by_their_tokens(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    heavy = await calls.send(1000)
    light = [await calls.send(100) for _ in range(9)]
    assert {sent[0] for sent in light} == {"a", "b"} - {heavy[0]}


async def test_a_replica_that_takes_no_more_is_passed_over() -> None:
    full = Replica("full", max_ongoing_requests=1, queue_len=1)
    router = make_router([full, Replica("free")])
    calls = Calls(router)
    names = {(await asyncio.wait_for(calls.taken(full), 5))[0] for _ in range(6)}
    assert names == {"free"}


async def test_what_has_ended_is_forgotten(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    for _ in range(3):
        calls.end(await calls.send(10, "call"), length_when_begun=1)
    calls.end(("a", "never sent"), length_when_begun=0)
    assert not router._sent
    assert not router._view._outstanding
    assert not router._view._replica_of


def test_serve_finds_the_router_by_its_name() -> None:
    assert isinstance(ROUTER, RequestRouterConfig)
    assert ROUTER.get_request_router_class() is LeastOutstandingRouter


class Messages:
    """Sends a message about a call as Serve's handle does."""

    def __init__(self, router: LeastOutstandingRouter) -> None:
        self._router = router

    async def about(self, call_id: str, *, is_retry: bool = False, internal_id: str = "of the message") -> str:
        metadata = RequestMetadata(request_id="message", internal_request_id=internal_id)
        pending = PendingRequest(args=[Forget(call_id, (0,))], kwargs={}, metadata=metadata)
        replica = await self._router._choose_replica_for_request(pending, is_retry=is_retry)
        self._router.on_request_completed(replica.replica_id, metadata.internal_request_id)
        return replica.replica_id.unique_id


async def test_what_is_said_about_a_call_goes_to_the_replica_that_has_it(router: LeastOutstandingRouter) -> None:
    calls, messages = Calls(router), Messages(router)
    sent = [await calls.send(10, f"id-{i}") for i in range(20)]
    assert [await messages.about(f"id-{i}") for i in range(20)] == [replica for replica, _ in sent]
    assert sum(router._view._outstanding.values()) == 200, "messages weigh nothing"


async def test_nothing_can_be_said_about_a_call_that_has_ended_or_never_was(router: LeastOutstandingRouter) -> None:
    calls, messages = Calls(router), Messages(router)
    calls.end(await calls.send(10, "ended"), length_when_begun=1)
    for call_id in ("ended", "never was"):
        with pytest.raises(CallNotUnderWayError):
            await messages.about(call_id)


async def test_a_message_that_a_replica_refused_is_not_tried_again(router: LeastOutstandingRouter) -> None:
    await Calls(router).send(10, "call")
    with pytest.raises(CallNotUnderWayError):
        await Messages(router).about("call", is_retry=True)


async def test_nothing_can_be_said_to_a_replica_that_is_gone() -> None:
    router = make_router([Replica("a")])
    await Calls(router).send(10, "call")
    router.update_replicas([Replica("b")])
    with pytest.raises(CallNotUnderWayError):
        await Messages(router).about("call")


async def test_a_call_that_its_replica_refused_is_known_where_it_went_then(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    refused = await calls.send(10, "call")
    taken = await calls.send(10, "call", internal_id=refused[1])
    assert taken[0] != refused[0]
    calls.end(refused, length_when_begun=1)
    assert await Messages(router).about("call") == taken[0]
    assert router._view._outstanding == {ReplicaID(taken[0], DEPLOYMENT): 10}


async def test_calls_that_one_request_makes_side_by_side_all_end(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    for sent in [await calls.send(tokens, internal_id="one request") for tokens in (10, 20, 30, 40)]:
        calls.end(sent, length_when_begun=1)
    assert not router._view._outstanding
    assert not router._sent


async def test_a_message_that_shares_its_id_with_the_call_does_not_end_it(router: LeastOutstandingRouter) -> None:
    sent = await Calls(router).send(10, "call", internal_id="one request")
    for _ in range(3):
        assert await Messages(router).about("call", internal_id="one request") == sent[0]
    Calls(router).end(sent, length_when_begun=1)
    assert not router._sent
    assert not router._view._outstanding
    assert not router._view._replica_of


NEW = Version("v2", "revision-2")


async def test_calls_made_in_one_turn_of_the_loop_see_each_other(router: LeastOutstandingRouter) -> None:
    """A router that counts a call only after it has waited would send all eight to one replica, or by chance."""
    calls = Calls(router)
    sent = await asyncio.gather(*(calls.send(10) for _ in range(8)))
    assert sorted(name for name, _ in sent) == ["a"] * 4 + ["b"] * 4
    assert set(router._view._outstanding.values()) == {40}


async def test_a_call_goes_to_replicas_of_its_version_alone_and_one_without_to_any() -> None:
    calls = Calls(make_router([Replica("old"), Replica("new", version=NEW), Replica("newer", version=NEW)]))
    for version, names in (("", {"old", "new", "newer"}), ("v1", {"old"}), ("v2", {"new", "newer"})):
        assert {(await calls.send(1, version=version))[0] for _ in range(24)} == names


@pytest.mark.parametrize("replicas", [[], [Replica("old")]], ids=["no replica", "another version"])
async def test_a_call_for_a_version_that_has_no_replica_is_told_at_once(replicas: list[Replica]) -> None:
    router = make_router(replicas)
    with pytest.raises(VersionGoneError):
        await asyncio.wait_for(Calls(router).send(1, version="v2"), 5)
    assert not router._sent
    assert not router._view._outstanding


async def test_a_call_that_waits_is_told_when_the_last_replica_of_its_version_leaves() -> None:
    full = Replica("new", max_ongoing_requests=1, queue_len=1, version=NEW)
    router = make_router([full, Replica("old")])
    waits = asyncio.create_task(Calls(router).send(1, version="v2", is_retry=True))
    await asyncio.sleep(0.1)
    assert not waits.done(), "its replica takes no more, and the other one is of another version"
    router.update_replicas([Replica("old")])
    with pytest.raises(VersionGoneError):
        await asyncio.wait_for(waits, 5)


async def test_a_call_that_waits_gets_no_replica_that_was_chosen_for_another_version() -> None:
    """Serve gives a replica that it has found to whoever has waited longest."""
    full = Replica("new", max_ongoing_requests=1, queue_len=1, version=NEW)
    router = make_router([full, Replica("old")])
    calls = Calls(router)
    waits = asyncio.create_task(calls.send(1, version="v2", is_retry=True))
    await asyncio.sleep(0.1)
    other = asyncio.create_task(calls.send(1, version="v1", is_retry=True))
    await asyncio.sleep(0.3)
    full.queue_len = 0
    router.on_new_queue_len_info(full.replica_id, 0)
    assert (await asyncio.wait_for(waits, 5))[0] == "new"
    assert (await asyncio.wait_for(other, 5))[0] == "old"


async def test_a_replica_that_fell_silent_is_taken_last_and_only_for_a_while(
    router: LeastOutstandingRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(router)
    silent, _ = await calls.send(1000, "call")
    router._view.distrust(router._view.replica_with("call"))
    (other,) = {"a", "b"} - {silent}
    assert {(await calls.send(10_000))[0] for _ in range(6)} == {other}, "however much the other has to do"
    router.update_replicas([Replica(silent)])
    assert (await calls.send(1))[0] == silent, "where there is no other"
    now = time.monotonic() + tier.DISTRUSTED_S
    monkeypatch.setattr(tier.time, "monotonic", lambda: now)
    router.update_replicas([Replica(silent), Replica(other)])
    assert (await calls.send(1))[0] == silent, "which has less to do"


async def test_a_replica_whose_call_has_failed_is_taken_last(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    sent = await calls.send(1000, "call")
    calls.end(sent, length_when_begun=1)
    router._view.distrust_owner_of("call")
    (other,) = {"a", "b"} - {sent[0]}
    assert {(await calls.send(10_000))[0] for _ in range(6)} == {other}, "however little the one that failed has to do"


async def test_calls_that_ended_long_ago_are_not_remembered(
    router: LeastOutstandingRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier, "RECENT_CALLS", 3)
    calls = Calls(router)
    for i in range(10):
        calls.end(await calls.send(1, f"call {i}"), length_when_begun=1)
    assert list(router._view._recent) == ["call 7", "call 8", "call 9"]


async def test_nobody_is_distrusted_for_a_call_that_has_ended(router: LeastOutstandingRouter) -> None:
    calls = Calls(router)
    calls.end(await calls.send(1, "call"), length_when_begun=1)
    router._view.distrust(router._view.replica_with("call"))
    assert {(await calls.send(1))[0] for _ in range(2)} == {"a", "b"}


async def test_the_view_tells_which_versions_there_are_and_when_that_changes(router: LeastOutstandingRouter) -> None:
    view, seen = tier.view_of(DEPLOYMENT), []
    view.on_change = lambda: seen.append(view.versions)
    router.update_replicas([Replica("a"), Replica("b", version=NEW)])
    router.on_replica_actor_died(Replica("a").replica_id)
    assert seen == [{VERSION, NEW}, {NEW}]


async def test_the_load_of_a_version_is_what_each_of_its_replicas_has_to_do() -> None:
    router = make_router([Replica("old"), Replica("new", version=NEW), Replica("newer", version=NEW)])
    calls = Calls(router)
    for version, tokens in (("v1", 30), ("v2", 30), ("v2", 50)):
        await calls.send(tokens, version=version)
    assert (router._view.load_of(VERSION), router._view.load_of(NEW)) == (30, 40)

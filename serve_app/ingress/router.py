"""Which replica gets the next call: the one with the least work under way, as far as this ingress replica has sent it.

Serve's own choice between two replicas compares queue lengths that its handles remember. When calls go by value over
gRPC, which is what makes hops cheap, a handle hears of a replica's queue only when a call *ends*, and then takes the
length at the time the call *began*: a replica with many calls waiting looks empty whenever one of them ends, and gets
the next ones too, while another one idles. Seen on ray 2.60 (`serve/_private/router.py`, `get_rejection_response`).
Counting what was sent and has not come back needs no remembering of answers, and weighs calls by their tokens.

It also knows which replica has a call, and sends there what is said about it (Forget).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

from ray.serve.exceptions import RayServeException
from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from serve_app.types import Forget


class CallNotUnderWayError(RayServeException):  # type: ignore[misc]  # Ray is untyped
    """The call that a message is about has ended, or has no replica yet; or its replica takes no messages now."""


class LeastOutstandingRouter(FIFOMixin, LocalityMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """A call weighs the `weight` of its first argument, or 1. Belongs to one event loop, as all routers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outstanding: Counter[ReplicaID] = Counter()
        self._sent: dict[tuple[ReplicaID, str], list[tuple[str, int]]] = defaultdict(list)
        self._replica_of: dict[str, ReplicaID] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The least loaded replica first, the others for when it takes no more calls."""
        replicas = [self._replicas[i] for i in self.apply_locality_routing(pending_request) if i in self._replicas]
        random.shuffle(replicas)  # so that equals share
        replicas.sort(key=lambda replica: self._outstanding[replica.replica_id])
        return [ranked for ranked in (replicas[:1], replicas[1:]) if ranked]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Count a call from the moment it has a replica; Serve tells of its end whatever becomes of it.

        Raises CallNotUnderWayError for a message that can reach nobody.
        """
        first = pending_request.args[0] if pending_request.args else None
        if isinstance(first, Forget):
            replica = self._replica_with(first.call_id, is_retry)
        else:
            replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        call_id, weight = getattr(first, "id", ""), int(getattr(first, "weight", 1))
        self._sent[replica.replica_id, pending_request.metadata.internal_request_id].append((call_id, weight))
        self._outstanding[replica.replica_id] += weight
        if call_id:
            self._replica_of[call_id] = replica.replica_id
        return replica

    def _replica_with(self, call_id: str, is_retry: bool) -> RunningReplica:
        """A message goes out once: Serve would try a replica that refuses it, or is gone, again and again."""
        replica = self._replicas.get(self._replica_of.get(call_id))
        if replica is None or is_retry:
            raise CallNotUnderWayError(f"no replica has call {call_id} and can be told of it")
        return replica

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Calls that one client request makes side by side share its id: which of them ended does not matter here."""
        sent = self._sent.get((replica_id, internal_request_id))
        if sent is None:
            return
        call_id, weight = sent.pop()
        if not sent:
            del self._sent[replica_id, internal_request_id]
        self._outstanding[replica_id] -= weight
        if self._outstanding[replica_id] <= 0:
            del self._outstanding[replica_id]
        if self._replica_of.get(call_id) == replica_id:
            del self._replica_of[call_id]

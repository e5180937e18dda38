"""Which replica gets the next call: the one with the least work under way, as far as this ingress replica has sent it.

Serve's own choice between two replicas compares queue lengths that its handles remember. When calls go by value over
gRPC, which is what makes hops cheap, a handle hears of a replica's queue only when a call *ends*, and then takes the
length at the time the call *began*: a replica with many calls waiting looks empty whenever one of them ends, and gets
the next ones too, while another one idles. Seen on ray 2.60 (`serve/_private/router.py`, `get_rejection_response`).
Counting what was sent and has not come back needs no remembering of answers, and weighs calls by their tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)


class LeastOutstandingRouter(FIFOMixin, LocalityMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """A call weighs the `weight` of its first argument, or 1. Belongs to one event loop, as all routers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outstanding: Counter[ReplicaID] = Counter()
        self._sent: dict[str, tuple[ReplicaID, int]] = {}

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
        """Count a call from the moment it has a replica; Serve tells of its end whatever becomes of it."""
        replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        weight = _weight(pending_request)
        self._sent[pending_request.metadata.internal_request_id] = (replica.replica_id, weight)
        self._outstanding[replica.replica_id] += weight
        return replica

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        sent = self._sent.pop(internal_request_id, None)
        if sent is None:
            return
        self._outstanding[sent[0]] -= sent[1]
        if self._outstanding[sent[0]] <= 0:
            del self._outstanding[sent[0]]


def _weight(pending_request: PendingRequest) -> int:
    first = pending_request.args[0] if pending_request.args else None
    return int(getattr(first, "weight", 1))

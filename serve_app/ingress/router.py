"""Which replica gets the next call: the one with the least work under way, as far as this ingress replica has sent it.

Serve's own choice between two replicas compares queue lengths that its handles remember. When calls go by value over
gRPC, which is what makes hops cheap, a handle hears of a replica's queue only when a call *ends*, and then takes the
length at the time the call *began*: a replica with many calls waiting looks empty whenever one of them ends, and gets
the next ones too, while another one idles. Seen on ray 2.60 (`serve/_private/router.py`, `get_rejection_response`).
Counting what was sent and has not come back needs no remembering of answers, and weighs calls by their tokens.

It also knows which replica has a call, and sends there what is said about it (Forget). And it keeps to the version that
a call is for (`serve_app.versions`): replicas of other versions are no candidates.

The replica is chosen and the call counted in one turn of the event loop, so that calls made side by side see each
other. Serve's own way, which waits for a routing task and asks replicas how long their queues are, is taken where no
replica is there yet, and after a replica has refused a call.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from serve_app.errors import VersionGoneError
from serve_app.ingress.tier import view_of
from serve_app.types import Forget, Version


class CallNotUnderWayError(RayServeException):  # type: ignore[misc]  # Ray is untyped
    """The call that a message is about has ended, or has no replica yet; or its replica takes no messages now."""


class LeastOutstandingRouter(FIFOMixin, LocalityMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """A call weighs the `weight` of its first argument, or 1, and is for the replicas of its `version`, or for all.

    Belongs to one event loop, as all routers do.
    """

    def __init__(self, *args: Any, deployment_id: DeploymentID, **kwargs: Any) -> None:
        super().__init__(*args, deployment_id=deployment_id, **kwargs)
        self._view = view_of(deployment_id)
        self._sent: dict[tuple[ReplicaID, str], list[tuple[str, int]]] = defaultdict(list)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._tell_view()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._tell_view()

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """A replica whose process is gone stays among the candidates until Serve's controller has noticed."""
        super().on_replica_actor_unavailable(replica_id)
        self._view.distrust(replica_id)

    def _tell_view(self) -> None:
        self._view.update({replica_id: _version(replica) for replica_id, replica in self._replicas.items()})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The least loaded replica first, the others for when it takes no more calls.

        A call that waits here for a replica of a version that is gone is ended with VersionGoneError.
        """
        fingerprint = "" if pending_request is None else _fingerprint(pending_request)
        replicas = self._ranked(pending_request, fingerprint)
        if not replicas and fingerprint and pending_request is not None and not pending_request.future.done():
            pending_request.future.set_exception(_gone(fingerprint))
        return [ranked for ranked in (replicas[:1], replicas[1:]) if ranked]

    def _ranked(self, pending_request: PendingRequest | None, fingerprint: str) -> list[RunningReplica]:
        ids = self.apply_locality_routing(pending_request)
        replicas = [self._replicas[i] for i in ids if i in self._replicas and self._view.has(i, fingerprint)]
        random.shuffle(replicas)  # so that equals share
        return sorted(replicas, key=lambda replica: self._view.rank(replica.replica_id))

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Count a call from the moment it has a replica; Serve tells of its end whatever becomes of it.

        Raises CallNotUnderWayError for a message that can reach nobody, VersionGoneError for a call whose version has
        no replica.
        """
        first = pending_request.args[0] if pending_request.args else None
        if isinstance(first, Forget):
            replica = self._replica_with(first.call_id, is_retry)
        else:
            replica = await self._least_loaded(pending_request, is_retry)
        call_id, weight = getattr(first, "id", ""), int(getattr(first, "weight", 1))
        self._sent[replica.replica_id, pending_request.metadata.internal_request_id].append((call_id, weight))
        self._view.sent(replica.replica_id, call_id, weight)
        return replica

    async def _least_loaded(self, pending_request: PendingRequest, is_retry: bool) -> RunningReplica:
        fingerprint = _fingerprint(pending_request)
        replicas = self._ranked(pending_request, fingerprint)
        if not replicas and fingerprint:
            raise _gone(fingerprint)
        if replicas and not is_retry:
            return replicas[0]
        return await self._waited_for(pending_request, fingerprint, is_retry)

    async def _waited_for(self, pending_request: PendingRequest, fingerprint: str, is_retry: bool) -> RunningReplica:
        """Serve gives a replica that it has found for one call to the one that has waited longest."""
        while True:
            replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
            if self._view.has(replica.replica_id, fingerprint):
                return replica
            is_retry = True

    def _replica_with(self, call_id: str, is_retry: bool) -> RunningReplica:
        """A message goes out once: Serve would try a replica that refuses it, or is gone, again and again."""
        replica = self._replicas.get(self._view.replica_with(call_id))
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
        self._view.ended(replica_id, call_id, weight)


def _version(replica: RunningReplica) -> Version:
    told = replica.replica_metadata
    return Version(told.get("fingerprint", ""), told.get("revision", ""))


def _fingerprint(pending_request: PendingRequest) -> str:
    first = pending_request.args[0] if pending_request.args else None
    return str(getattr(first, "version", ""))


def _gone(fingerprint: str) -> VersionGoneError:
    return VersionGoneError(f"no replica of version {fingerprint} is left", retry_after_s=1.0)

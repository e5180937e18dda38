"""One tier of one model as an ingress replica sees it: the handle to its deployment, and what its replicas are."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID

from serve_app.types import Forget, Version

DISTRUSTED_S = 30.0
"""How long a replica that did not answer gets no calls while others take them."""


RECENT_CALLS = 1024
"""Calls that have ended of which the view still knows who had them."""


class TierView:
    """What this process knows of one deployment's replicas: their versions, and the work that it has sent them.

    Belongs to one event loop. The router of the deployment keeps it up to date.
    """

    def __init__(self) -> None:
        self._versions: dict[ReplicaID, Version] = {}
        self._outstanding: Counter[ReplicaID] = Counter()
        self._replica_of: dict[str, ReplicaID] = {}
        self._recent: dict[str, ReplicaID] = {}
        self._distrusted: dict[ReplicaID, float] = {}
        self.versions: frozenset[Version] = frozenset()
        """Each version of which a replica runs."""
        self.on_change: Callable[[], object] = lambda: None
        """Called when replicas have come or gone."""

    def load_of(self, version: Version) -> float:
        """Work under way for each replica of `version`, which has one at least."""
        replicas = [replica for replica, has in self._versions.items() if has == version]
        return sum(self._outstanding[replica] for replica in replicas) / len(replicas)

    def distrust(self, replica: ReplicaID | None) -> None:
        """The replica did not answer: others are taken before it for a while."""
        if replica is not None:
            self._distrusted[replica] = time.monotonic() + DISTRUSTED_S

    def distrust_owner_of(self, call_id: str) -> None:
        """The replica that has the call, or had it lately, could not answer it."""
        self.distrust(self._replica_of.get(call_id) or self._recent.get(call_id))

    def update(self, versions: dict[ReplicaID, Version]) -> None:
        """These are the replicas now."""
        self._versions = versions
        self.versions = frozenset(versions.values())
        self._distrusted = {replica: until for replica, until in self._distrusted.items() if replica in versions}
        self.on_change()

    def has(self, replica: ReplicaID, fingerprint: str) -> bool:
        """Whether the replica takes calls for that version; an empty one is any."""
        return not fingerprint or self._versions.get(replica, _NO_VERSION).fingerprint == fingerprint

    def rank(self, replica: ReplicaID) -> tuple[bool, int]:
        """Less is better."""
        return self._distrusted.get(replica, 0.0) > time.monotonic(), self._outstanding[replica]

    def replica_with(self, call_id: str) -> ReplicaID | None:
        return self._replica_of.get(call_id)

    def sent(self, replica: ReplicaID, call_id: str, weight: int) -> None:
        self._outstanding[replica] += weight
        if call_id:
            self._replica_of[call_id] = replica

    def ended(self, replica: ReplicaID, call_id: str, weight: int) -> None:
        self._outstanding[replica] -= weight
        if self._outstanding[replica] <= 0:
            del self._outstanding[replica]
        if self._replica_of.get(call_id) == replica:
            del self._replica_of[call_id]
            self._recent[call_id] = replica
            if len(self._recent) > RECENT_CALLS:
                del self._recent[next(iter(self._recent))]


_NO_VERSION = Version("", "")
_views: dict[DeploymentID, TierView] = defaultdict(TierView)


def view_of(deployment: DeploymentID) -> TierView:
    """The view of a deployment, for this process; it fills as soon as a handle to the deployment has its router."""
    return _views[deployment]


@dataclass(frozen=True, slots=True)
class Tier:
    """`handle` is Serve's, to the deployment that `view` is of."""

    handle: Any
    view: TierView

    async def lives(self, call_id: str) -> object:
        """Return when the replica that has the call says that it can compute.

        The message is about no request, so it changes nothing there. Raises what Ray and Serve raise, a RayTaskError
        with UnavailableError as its cause if the replica can compute no more.
        """
        return await self.handle.forget.remote(Forget(call_id, ()))

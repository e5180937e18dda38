"""The way in and out that every request takes, by HTTP or gRPC: its key, its quotas, its place, its part in the
metrics, its line in the log.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serve_app.config import MOST_QUESTIONS
from serve_app.ingress.access import Account, Guard
from serve_app.ingress.access_log import log_request
from serve_app.ingress.asked import PRIORITY, TIMEOUT, asked_priority, asked_timeout_s, room_for
from serve_app.ingress.counting import count
from serve_app.ingress.keys import Role
from serve_app.ingress.places import Places
from serve_app.ingress.reach import check_host
from serve_app.ingress.routes import Kind
from serve_app.ingress.visit import Visit
from serve_app.metrics import IngressMetrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""Request ids that may go into responses and logs; any other is replaced."""


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The client's own, if it is a harmless one, else a new one."""
    asked = headers.get(b"x-request-id", b"")
    return asked.decode() if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex


class Door:
    """Of one ingress replica; open to all unless there is a guard. Belongs to one event loop."""

    def __init__(self, guard: Guard | None = None, metrics: IngressMetrics | None = None) -> None:
        """Without `metrics` nothing is counted."""
        self.guard = guard
        self.local_only = False
        """Whether HTTP is for this machine alone. Without keys, requests must then name it in `Host`."""
        self._metrics = metrics
        self.bodies = Places()
        self._requests, self._questions = Places(), Places()

    @contextmanager
    def visited(self, visit: Visit) -> Iterator[None]:
        """The block is all of the request, its answer included; afterwards it is paid for, counted and told."""
        try:
            yield
        finally:
            self.leave(visit)
            visit.settle()
            if self._metrics is not None and visit.is_counted:
                count(visit, self._metrics)
            if visit.settings.log_requests:
                log_request(visit)

    def leave(self, visit: Visit) -> None:
        """Its places are free; it may be told before the end, of a request that does nothing any more."""
        if visit.place is not None:
            visit.place.leave(time.perf_counter() - visit.started)
            visit.place = None
        if visit.held_bytes:
            self.bodies.leave(time.perf_counter() - visit.started, visit.held_bytes)
            visit.held_bytes = 0

    def account(self, headers: Mapping[bytes, bytes], role: Role | None) -> Account | None:
        """That of the key for `role`; None where no key is asked. Raises UnauthorizedError or ForbiddenError."""
        return None if self.guard is None or role is None else self.guard.admit(headers, role)

    def admit(self, visit: Visit, role: Role | None, kind: Kind) -> None:
        """Let it in: with a key for `role` where there are keys, and with a place where it may take long.

        What asks for no key (a `role` of None) is open to every `Host` too.

        Raises UnauthorizedError, ForbiddenError, QuotaExceededError, MalformedRequestError or OverloadedError.
        """
        visit.account = self.account(visit.headers, role)
        if self.guard is None and self.local_only and role is not None:
            check_host(visit.headers.get(b"host", b""), visit.settings.allowed_hosts)
        if kind == "question":
            self._place(visit, self._questions, MOST_QUESTIONS, "questions about the server are open")
        elif kind == "inference":
            self._admit_inference(visit)

    def _admit_inference(self, visit: Visit) -> None:
        """With its own deadline and priority, and counted for its key."""
        if TIMEOUT in visit.headers:
            visit.timeout_s = asked_timeout_s(visit.headers[TIMEOUT], visit.timeout_s)
        if PRIORITY in visit.headers:
            visit.priority = asked_priority(visit.headers[PRIORITY])
        if visit.account is not None and visit.account.priority == "bulk":
            visit.priority = "bulk"
        most = room_for(visit.priority, visit.settings.max_concurrent_requests)
        self._place(visit, self._requests, most, "requests are under way")
        if visit.account is not None:
            visit.account.enter()

    def _place(self, visit: Visit, places: Places, most: int, what: str) -> None:
        places.take(most, what)
        visit.place = places

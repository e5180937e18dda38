"""The way in and out that every request takes, by HTTP or gRPC: its key, its quotas, its place, its line in the log."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serve_app.errors import OverloadedError, bounded_wait_s
from serve_app.ingress.access import Guard
from serve_app.ingress.access_log import log_request
from serve_app.ingress.deadlines import TIMEOUT, asked_timeout_s
from serve_app.ingress.keys import Role
from serve_app.ingress.reach import check_host
from serve_app.ingress.visit import Visit

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""Request ids that may go into responses and logs; any other is replaced."""

_SHARE = 0.05


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The client's own, if it is a harmless one, else a new one."""
    asked = headers.get(b"x-request-id", b"")
    return asked.decode() if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex


class Pace:
    """How long requests keep their places, as a mean in which each new one counts for `_SHARE`."""

    def __init__(self) -> None:
        self._mean_s: float | None = None

    def took(self, seconds: float) -> None:
        known_s = seconds if self._mean_s is None else self._mean_s
        self._mean_s = known_s + _SHARE * (seconds - known_s)

    def wait_s(self, under_way: int, most: int) -> float:
        """Seconds until half of the places are free: by Little's law `under_way / mean` become free each second."""
        wait_s = (under_way - most / 2) / under_way * (self._mean_s or 0.0)
        return bounded_wait_s(wait_s)


class Door:
    """Of one ingress replica; open to all unless there is a guard. Belongs to one event loop."""

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard
        self.local_only = False
        """Whether HTTP is for this machine alone. Without keys, requests must then name it in `Host`."""
        self._under_way = 0
        self._pace = Pace()

    @contextmanager
    def visited(self, visit: Visit) -> Iterator[None]:
        """The block is all of the request, its answer included; afterwards it is paid for and told."""
        try:
            yield
        finally:
            self.leave(visit)
            visit.settle()
            if visit.settings.log_requests:
                log_request(visit)

    def leave(self, visit: Visit) -> None:
        """Its place is free; it may be told before the end, of a request that does nothing any more."""
        if visit.counted:
            visit.counted = False
            self._under_way -= 1
            self._pace.took(time.perf_counter() - visit.started)

    def admit(self, visit: Visit, role: Role | None, counts: bool) -> None:
        """Let it in: with a key for `role` where there are keys; counted, and with its own deadline, if it `counts`.

        What asks for no key (a `role` of None) is open to every `Host` too.

        Raises UnauthorizedError, ForbiddenError, QuotaExceededError, MalformedRequestError or OverloadedError.
        """
        if self.guard is not None and role is not None:
            visit.account = self.guard.admit(visit.headers, role)
        elif self.local_only and role is not None:
            check_host(visit.headers.get(b"host", b""), visit.settings.allowed_hosts)
        if not counts:
            return
        if TIMEOUT in visit.headers:
            visit.timeout_s = asked_timeout_s(visit.headers[TIMEOUT], visit.timeout_s)
        most = visit.settings.max_concurrent_requests
        if self._under_way >= most:
            wait_s = self._pace.wait_s(self._under_way, most)
            raise OverloadedError(f"{most} requests are under way here; come back later", retry_after_s=wait_s)
        if visit.account is not None:
            visit.account.enter()
        self._under_way += 1
        visit.counted = True

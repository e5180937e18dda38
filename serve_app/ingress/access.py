"""Who may ask what, and how much: a request's API key, its role, and its quotas."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_app.errors import ForbiddenError, QuotaExceededError, UnauthorizedError
from serve_app.ingress.keys import Key, KeyRing, Role, presented_keys
from serve_app.types import Priority


class Bucket:
    """So many a minute, a whole minute's at once after a quiet one. What was spent beyond that is a debt."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled = clock()

    def wait_s(self, wanted: float = 0.0) -> float:
        """Seconds until there is more than nothing, and `wanted`; 0 if there is now."""
        self._fill()
        missing = wanted - self._level
        if missing < 0 or (missing == 0 and wanted):
            return 0.0
        return max(missing * 60 / self.per_minute, 1e-3)

    def spend(self, amount: float) -> None:
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._filled) * self.per_minute / 60)
        self._filled = now


@dataclass(frozen=True, slots=True)
class Account:
    """One key and what is left of its quotas in this ingress replica."""

    key: Key
    requests: Bucket | None
    tokens: Bucket | None

    @property
    def priority(self) -> Priority:
        return self.key.priority

    def enter(self) -> None:
        """Count one request. Raises QuotaExceededError, and then counts nothing."""
        _check(self.requests, 1.0, "requests")
        _check(self.tokens, 0.0, "tokens")
        if self.requests is not None:
            self.requests.spend(1)

    def reserve(self, tokens: int) -> None:
        """Charge tokens before they are computed. Raises QuotaExceededError if other requests have used all up."""
        _check(self.tokens, 0.0, "tokens")
        self.charge(tokens)

    def charge(self, tokens: int) -> None:
        """Count tokens that a request has cost; less than 0 gives back what it did not."""
        if self.tokens is not None:
            self.tokens.spend(tokens)


def _check(bucket: Bucket | None, wanted: float, what: str) -> None:
    """Raises QuotaExceededError unless the bucket has something, and `wanted`."""
    wait_s = 0.0 if bucket is None else bucket.wait_s(wanted)
    if wait_s:
        raise QuotaExceededError(
            f"this API key has used its {what} of this minute; come back in {math.ceil(wait_s)} s",
            retry_after_s=wait_s,
        )


class Guard:
    """Lets those in who have a key of the right role. Quotas are counted by each ingress replica for itself."""

    def __init__(self, ring: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring = ring
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def admit(self, headers: Mapping[bytes, bytes], role: Role) -> Account:
        """Raises UnauthorizedError or ForbiddenError, neither of which repeats what was presented."""
        for presented in presented_keys(headers):
            key = self._ring.find(presented)
            if key is not None:
                if role not in key.roles:
                    raise ForbiddenError(f"this API key may not be used here; it takes one of the role {role}")
                return self._account(key)
        raise UnauthorizedError(
            "send an API key of this server, as `Authorization: Bearer <key>` or `x-api-key: <key>`"
        )

    def _account(self, key: Key) -> Account:
        """The key's account; one whose line has changed keeps the buckets whose quotas have not."""
        known = self._accounts.get(key.name)
        if known is not None and known.key == key:
            return known
        requests, tokens = (None, None) if known is None else (known.requests, known.tokens)
        account = Account(
            key, self._bucket(key.requests_per_minute, requests), self._bucket(key.tokens_per_minute, tokens)
        )
        self._accounts[key.name] = account
        return account

    def _bucket(self, per_minute: int | None, known: Bucket | None) -> Bucket | None:
        if per_minute is None:
            return None
        return known if known is not None and known.per_minute == per_minute else Bucket(per_minute, self._clock)

"""How many requests of one kind, or bytes of them, may be under way in an ingress replica at a time."""

from __future__ import annotations

from serve_app.errors import OverloadedError, bounded_wait_s

_SHARE = 0.05


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


class Places:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._taken = 0
        self._pace = Pace()

    def take(self, most: int, what: str, places: int = 1) -> None:
        """Raises OverloadedError where more than `most` of them, which `what` names, would be under way."""
        if self._taken + places > most:
            wait_s = self._pace.wait_s(max(self._taken, 1), most)
            raise OverloadedError(f"{most} {what} here; come back later", retry_after_s=wait_s)
        self._taken += places

    def leave(self, after_s: float, places: int = 1) -> None:
        """Places that were taken `after_s` seconds ago are free."""
        self._taken -= places
        self._pace.took(after_s)

"""One run of the same work for all who ask for it at the same time."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Callers share the run that is under way, and for `kept_s` seconds after its end its outcome, be it an error.

    A caller that is cancelled leaves the run to the others. Belongs to one event loop.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]], kept_s: float) -> None:
        self._work = work
        self._kept_s = kept_s
        self._run: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        """What `work` returns or raises."""
        run = self._run
        if run is None:
            # In a context of its own: Serve cancels what a request's context has called when its client leaves.
            run = self._run = contextvars.Context().run(asyncio.ensure_future, self._work())
            run.add_done_callback(self._keep)
        if not run.done():
            await asyncio.wait((run,))
        return run.result()

    def _keep(self, run: asyncio.Future[T]) -> None:
        if not run.cancelled():
            run.exception()  # so that asyncio does not report it as lost where no caller is left
        if not self._kept_s:
            self._forget()
        elif self._kept_s < math.inf:
            run.get_loop().call_later(self._kept_s, self._forget)

    def _forget(self) -> None:
        self._run = None

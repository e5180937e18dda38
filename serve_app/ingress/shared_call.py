"""One call to a replica that several requests wait for, and what becomes of it when they leave.

The replica is told of those that leave while others stay, so that it need not compute for them; with the last one the
call itself is cancelled. While nobody leaves, none of this sends anything.

A call may take long, because a replica has a queue. So no call has a limit of its own; the replica that has a long call
is asked whether it lives, and one that does not answer (its process is stopped, its machine is gone), or says that it
cannot compute any more (its device hangs), loses the call.

A request whose call was lost is sent again, once. It may be what its replica died of, so it goes in a call of its own,
and one such request at a time: then it takes none of the others with it that were lost together with it.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeGuard

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from serve_app.errors import UnavailableError, VersionGoneError
from serve_app.ingress.tier import Tier
from serve_app.timeouts import within

Stage: TypeAlias = Literal["waiting", "tokenize", "model"]
"""Where a request is when its client leaves: not sent yet, or at a tier."""

Forgetting: TypeAlias = Callable[[tuple[int, ...]], Awaitable[bool]]
"""Tells the replica which of the call's requests nobody waits for; False if it does not know the call (yet)."""

TELL_AGAIN_S = 0.05
"""The first pause before a replica is told again that had not got the call yet; each is twice the one before."""

PULSE_S = 3.0
"""Seconds after which the replica that has a call is asked whether it lives, and between two such questions."""

PULSE_TIMEOUT_S = 3.0
"""Seconds that it may take to say so; its event loop is never busy for a tenth of that."""


Losses: TypeAlias = set[int]
"""Prompts of one request (0 where one call is for all) whose call was lost once, with whatever version."""


def is_lost(outcome: object) -> TypeGuard[UnavailableError]:
    """Whether it says that the replica which had a call could not answer it, and another one may."""
    return isinstance(outcome, UnavailableError) and not isinstance(outcome, VersionGoneError)


def lost_again(error: UnavailableError) -> UnavailableError:
    """What a request ends with whose call was sent again, by itself, and ended in `error`."""
    if not is_lost(error):
        return error
    why = f"two replicas were lost while they had this request, so it is not sent a third time ({error.message})"
    return UnavailableError(why, retry_after_s=error.retry_after_s)


class OneByOne:
    """Lets one request at a time send again what was lost. Belongs to one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, deadline: float) -> AsyncIterator[None]:
        """Wait for a turn, which lasts as long as the block, for half of the time that is left until `deadline`.

        A request whose turn has not come by then goes beside others, so as not to be late.
        """
        acquiring = asyncio.ensure_future(self._lock.acquire())
        try:
            await asyncio.wait((acquiring,), timeout=max(0.0, deadline - time.monotonic()) / 2)
            yield
        finally:
            if not acquiring.cancel():
                self._lock.release()


class Pulse:
    """Within a `with` block: asks the replica that has a call, while it takes long, whether it lives.

    A replica that loses the call gets none while others take them. Belongs to one event loop.
    """

    def __init__(self, tier: Tier, call_id: str, on_loss: Callable[[], None]) -> None:
        """`on_loss` is called once, if the replica that has the call says nothing, or that it cannot compute."""
        self._loss = ""
        self._is_stopped = False
        self._tier, self._call_id, self._on_loss = tier, call_id, on_loss
        self._context = contextvars.copy_context()  # see SharedCall
        self._asking: asyncio.Future[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(PULSE_S, self._start)

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._is_stopped = True
        self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()
        if is_lost(error):
            self._tier.view.distrust_owner_of(self._call_id)

    def raise_if_lost(self, error: BaseException) -> None:
        """Raises UnavailableError from `error`, a cancellation, if it was this that ended the call."""
        if self._loss and not _is_cancelled():
            raise UnavailableError(self._loss, retry_after_s=1.0) from error

    def _start(self) -> None:
        self._asking = self._context.run(asyncio.ensure_future, self._watch())

    async def _watch(self) -> None:
        while not self._is_stopped:
            try:
                await within(self._tier.lives(self._call_id), PULSE_TIMEOUT_S)
            except asyncio.TimeoutError:
                self._lose("the replica that had the request fell silent")
                return
            except (RayError, RayServeException, UnavailableError) as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if is_lost(cause):
                    self._lose(f"the replica that had the request cannot compute: {cause.message}")
                    return
                # Else no replica has the call yet, or the call itself is about to tell what happened to its replica.
            await asyncio.sleep(PULSE_S)

    def _lose(self, why: str) -> None:
        self._loss = why
        self._on_loss()


def _is_cancelled() -> bool:
    """Whether the running task itself is cancelled, and not only what it awaits (not told before Python 3.11)."""
    cancelling: Callable[[], int] = getattr(asyncio.current_task(), "cancelling", lambda: 0)
    return cancelling() > 0


class NobodyWaitsError(Exception):
    """Every request of the call has left, and the call was cancelled or not sent."""


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that takes part in one shared call after the other."""

    left: bool = field(default=False, init=False)
    call: SharedCall | None = field(default=None, init=False)
    index: int = field(default=0, init=False)
    """Its place in `call`."""

    @property
    def stage(self) -> Stage:
        return "waiting" if self.call is None else self.call.stage

    def leave(self) -> None:
        """The client is gone: nothing needs to be computed for it any more."""
        self.left = True
        if self.call is not None:
            self.call.without(self.index)


class SharedCall:
    """Belongs to one event loop. Waiters that have left before it is made keep their index, and nothing else."""

    def __init__(
        self,
        stage: Stage,
        method: Any,
        waiters: Sequence[Waiter],
        tier: Tier,
        call_id: str,
        forget: Forgetting | None = None,
    ) -> None:
        """`method` is one of the tier's handle; without `forget` the replica cannot be told of some that leave."""
        self.stage = stage
        self._method = method
        self._forget = forget
        self._tier, self._call_id = tier, call_id
        self._waiting = sum(not waiter.left for waiter in waiters)
        self._gone: list[int] = []
        self._response: Any = None
        self._ended = False
        self._telling: asyncio.Future[None] | None = None
        # Serve cancels what a request's own context has called when the request is cancelled. What a leaving request
        # sets off must therefore run in this call's context, which belongs to no request.
        self._context = contextvars.copy_context()
        for index, waiter in enumerate(waiters):
            waiter.call, waiter.index = self, index

    async def answer(self, argument: Any) -> Any:
        """What the replica answers; what user code raised there is raised as it was.

        Raises NobodyWaitsError once every waiter has left, and UnavailableError if the replica has fallen silent or
        says that it can compute no more.
        """
        self._response = self._method.remote(argument)
        with Pulse(self._tier, self._call_id, self._response.cancel) as pulse:
            try:
                return await self._response
            except RayTaskError as error:
                raise error.cause from None
            except (asyncio.CancelledError, RequestCancelledError) as error:
                pulse.raise_if_lost(error)
                if self._waiting:
                    self._response.cancel()
                    raise
                raise NobodyWaitsError from None
            finally:
                self._ended = True

    def without(self, index: int) -> None:
        """The waiter at `index` has left."""
        self._waiting -= 1
        if self._ended:
            return
        if not self._waiting:
            self._response.cancel()
        elif self._forget is not None:
            self._gone.append(index)
            if self._telling is None:
                self._telling = self._context.run(asyncio.ensure_future, self._tell(self._forget))

    async def _tell(self, forget: Forgetting) -> None:
        """One message at a time, with all that have left meanwhile: a thousand that leave at once are one message."""
        pause_s = TELL_AGAIN_S
        while self._gone and self._waiting and not self._ended:
            gone, self._gone = self._gone, []
            if not await forget(tuple(gone)):
                self._gone += gone
                await asyncio.sleep(pause_s)
                pause_s *= 2
        self._telling = None

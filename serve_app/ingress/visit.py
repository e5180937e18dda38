"""A request from its arrival to the end of its answer, whatever protocol it came by."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.config import IngressSettings
from serve_app.errors import DeadlineExceededError, ServeAppError, ServerError
from serve_app.ingress.access import Account
from serve_app.ingress.places import Places
from serve_app.ingress.service import Service
from serve_app.types import Answer, Priority, Request, Usage

logger = logging.getLogger(__name__)

CANCELLED = "cancelled"
"""In the place of an error's code, of a request whose client did not wait for its answer."""


@dataclass(slots=True)
class Visit:
    """What the edge knows of a request; `settings` are those in force when it arrived."""

    id: str
    headers: Mapping[bytes, bytes]
    """Of a gRPC call its metadata; names in lower case."""
    service: Service
    settings: IngressSettings
    timeout_s: float = 0.0
    """Seconds that the request may take from its arrival on: the client's own, never more than the server's."""
    priority: Priority = "interactive"
    account: Account | None = None
    """Of the API key, where keys are on."""
    usage: Usage = field(default_factory=Usage)
    """What it has cost so far."""
    reserved: int = 0
    """Tokens that its account was charged with before they were computed."""
    truncated: int = 0
    """Inputs that were cut, of an answer in pieces."""
    revision: str = ""
    """Revision of the model that makes an answer in pieces, once it is known."""
    place: Places | None = None
    """Where it is counted while it is under way."""
    bodies: Places | None = None
    """Where the bytes of its body are counted as long; None: nowhere."""
    held_bytes: int = 0
    """As many of them as are counted."""
    route: tuple[str, str] | None = None
    """Method and path of the route that was found, as the table has them; of a gRPC call "gRPC" and its method."""
    is_counted: bool = True
    """Whether metrics count it among the requests; False for what operators and load balancers ask."""
    model: str = ""
    """The served model that it is about, once that is known."""
    task: str = ""
    """What that model is to do, once that is known."""
    request: Request | None = None
    answer: Answer | None = None
    status: int = 0
    """What was answered, as HTTP tells it; 0 until all of it was."""
    code: str = "ok"
    """Of the error that was answered."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def time_left_s(self) -> float:
        return max(0.0, self.timeout_s - (time.perf_counter() - self.started))

    def hold(self, size: int) -> None:
        """Count its body as one of `size` bytes, unless more are counted. Raises OverloadedError."""
        if self.bodies is not None and size > self.held_bytes:
            most = self.settings.max_bodies_bytes
            self.bodies.take(most, "bytes of bodies are the most at a time", size - self.held_bytes)
            self.held_bytes = size

    def reserve(self, tokens: int) -> None:
        """Charge an estimate to the account, if there is one. Raises QuotaExceededError."""
        if self.account is not None:
            self.account.reserve(tokens)
            self.reserved += tokens

    @property
    def outcome(self) -> str:
        """How it ended: "ok", the code of the error that was answered, or CANCELLED."""
        return self.code if self.status else CANCELLED

    def settle(self) -> None:
        """Charge what was computed in the place of the estimate, whatever was answered.

        The estimate stays where nobody can tell what was computed: after a timeout, a failure, or if the client left.
        """
        if self.account is not None:
            known = self.usage.tokens
            cost = max(known, self.reserved) if self.usage.is_uncertain else known
            self.account.charge(cost - self.reserved)

    def expected(self, error: Exception) -> ServeAppError:
        """`error` as the client may know it, and the log line too: what is a bug of ours tells nothing of itself."""
        if not isinstance(error, ServeAppError):
            logger.error("unexpected error in request %s", self.id, exc_info=error)
            error = ServerError("an unexpected error; the server's log has it under this request id")
        self.code = error.code
        return error


def too_late() -> DeadlineExceededError:
    return DeadlineExceededError("the request's time ran out before its answer; send less at once or allow more time")

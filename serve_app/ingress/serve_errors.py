"""Ray Serve's own error replies, in the shape of the protocol that was spoken.

Serve answers in plain text, sometimes with an exception in it, where no application has the path, where a deployment is
overloaded or has no replica, where one was lost, and where its own timeout has passed. What the application answers is
JSON if it is an error; so an error that is not JSON is Serve's, and goes out in an envelope of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import (
    DeadlineExceededError,
    OverloadedError,
    RequestError,
    RouteNotFoundError,
    ServeAppError,
    ServerError,
    UnavailableError,
)
from serve_app.ingress.exchange import JSON, Header
from serve_app.ingress.refusals import dialect_of, error_reply
from serve_app.ingress.writing import unchunked

logger = logging.getLogger(__name__)

_PATHS_OF_SERVE = "/-/"
"""Serve's health and routes, which HAProxy and load balancers read."""

_FAILED = "the request failed in the server; its log has it under this request id"
_TIME_OVER = "the request's time ran out before its answer; send less at once or allow more time"

ERRORS: Mapping[int, tuple[type[ServeAppError], str]] = {
    404: (RouteNotFoundError, "no application is served at this path"),
    408: (DeadlineExceededError, _TIME_OVER),
    429: (OverloadedError, "too many requests wait here; come back later"),
    503: (UnavailableError, "no replica can take the request now: it is overloaded, starting or lost; come back later"),
    504: (DeadlineExceededError, _TIME_OVER),
}
"""What each status of Serve's means. Its 408 is its own timeout, ours a body that does not arrive."""


@dataclass(slots=True)
class _Sender:
    """Passes messages on as they come, and puts an envelope in the place of a reply that is not the application's."""

    send: Send
    server: Any
    """What the server has of the response, where it lets it be seen; else None."""
    path: str
    request_id: bytes
    started: bool = False
    ended: bool = False
    replacing: bool = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.replacing = message["status"] >= 400 and not _is_json(message["headers"])
            if self.replacing:
                await self.answer(error_of(message["status"], message["headers"]))
        if not self.replacing:
            await self.send(message)
            self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def answer(self, error: ServeAppError, *further: Header) -> None:
        """In the place of whatever Serve would answer."""
        self.started = self.replacing = True
        reply = error_reply(error, dialect_of(self.path), self.request_id.decode())
        assert isinstance(reply.body, bytes)
        headers = [
            (b"content-type", reply.content_type),
            (b"content-length", b"%d" % len(reply.body)),
            (b"x-request-id", self.request_id),
            *reply.headers,
            *further,
        ]
        await self.send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": reply.body})
        self.ended = True

    def abort(self) -> None:
        """Let go of a client whose answer has no end: closing the connection would wait until it has read the rest.

        Does nothing with servers that do not let the transport be seen, as uvicorn does.
        """
        transport = getattr(self.server, "transport", None)
        abort = getattr(transport, "abort", None)
        if abort is not None:
            abort()


async def enveloped(app: ASGIApp, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
    """`app`, and every error it sends, raises or is silent about in our shape. Nothing is held back.

    Silence is how Serve's Python proxy tells that a replica was lost.
    """
    if scope["type"] != "http" or scope["path"].startswith(_PATHS_OF_SERVE):
        await app(scope, receive, send)
        return
    sender = _Sender(unchunked(scope, send), getattr(send, "__self__", None), scope["path"], request_id)
    try:
        await app(scope, receive, sender)
    except RequestError as error:
        await sender.answer(error, (b"connection", b"close"))
    except Exception:
        if sender.started:
            raise
        logger.exception("Ray Serve failed in request %s", request_id.decode())
        await sender.answer(ServerError(_FAILED))
    finally:
        if sender.started and not sender.ended:
            sender.abort()
    if not sender.started:
        await sender.answer(UnavailableError("the replica that had the request was lost; send it again"))


def error_of(status: int, headers: list[Header]) -> ServeAppError:
    """What Serve meant. Nothing of its text is kept: it repeats paths and tells exceptions."""
    usual = (RequestError, "the server cannot take this request") if status < 500 else (ServerError, _FAILED)
    cls, message = ERRORS.get(status, usual)
    wait = dict(headers).get(b"retry-after", b"")
    return cls(message, retry_after_s=float(wait) if wait.isdigit() else None)


def _is_json(headers: list[Header]) -> bool:
    return any(name == b"content-type" and value == JSON for name, value in headers)

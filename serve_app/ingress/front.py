"""What stands before Ray Serve's own request handling, and after it.

On the way in, the headers by which a client would steer Serve are taken out; on the way out, errors that Serve answers
itself are put in our shape (`serve_errors`).

Serve reads some headers before the application is called: two that turn its timeout and its cancellation off, one that
goes back in the response as it came, and some that it decodes, so that a byte that is not UTF-8 there is a 500. A
middleware of ours inside the application would be too late. Serve takes middlewares that run before all this from the
function that `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names: in each ingress replica where HAProxy is on, in the
Python proxy where it is off. `serve_config.yaml` names `serve_app.ingress.front:middlewares`.
"""

from __future__ import annotations

import os
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import MalformedRequestError
from serve_app.ingress.door import REQUEST_ID
from serve_app.ingress.serve_errors import enveloped

_ID_HEADER = b"x-request-id"

TAKEN_OUT = frozenset(
    {
        b"x-request-timeout-seconds",  # 0 turns Serve's timeout off
        b"x-request-disconnect-disabled",  # ?1 turns cancellation off
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode(),
    }
)
"""Headers that Serve acts on and this application has no use for."""


_behind: ASGIApp | None = None
"""What Serve answers with in this process, once it does."""


class Front:
    """Passes on each request with exactly one harmless request id, and without `TAKEN_OUT`; answers in our shapes."""

    def __init__(self, app: ASGIApp, *, is_serves: bool = False) -> None:
        """`is_serves` of the one that Serve makes for the whole process."""
        global _behind
        self._app = app
        if is_serves:
            _behind = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        scope["headers"], request_id = cleaned(scope["headers"])
        app = _refuse_upgrade if loses_its_body(scope) else self._app
        await enveloped(app, scope, receive, send, request_id)


def cleaned(headers: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """`headers` as Serve and the application may see them, and the request id among them.

    Names are in lower case, as ASGI has them.
    """
    kept = [header for header in headers if header[0] not in TAKEN_OUT]
    ids = [value for name, value in kept if name == _ID_HEADER]
    if len(ids) == 1 and REQUEST_ID.fullmatch(ids[0]):
        return kept, ids[0]
    if ids:
        kept = [header for header in kept if header[0] != _ID_HEADER]
    new = uuid.uuid4().hex.encode()
    kept.append((_ID_HEADER, new))
    return kept, new


def loses_its_body(scope: Scope) -> bool:
    """Whether the server has taken what follows the head for another protocol, as uvicorn does with any `upgrade`."""
    headers = dict(scope["headers"])
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    return scope["type"] == "http" and b"upgrade" in headers and has_body


async def _refuse_upgrade(scope: Scope, receive: Receive, send: Send) -> None:
    raise MalformedRequestError(
        "the body is lost, because the header upgrade asks for a protocol that is not spoken here; leave that header "
        "out (curl: --http1.1)"
    )


async def is_stopping() -> bool:
    """Whether Serve's health route says that this replica drains, that is finishes what it has and then stops.

    False where Serve answers HTTP in another process, as without HAProxy.
    """
    body = b""

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    async def receive() -> Message:
        return {"type": "http.request"}

    if _behind is not None:
        scope = {"type": "http", "method": "GET", "path": "/-/healthz", "headers": [], "query_string": b""}
        await _behind(scope, receive, send)
    return b"DRAINING" in body


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for once in each process that answers HTTP."""
    return [Middleware(Front, is_serves=True)]

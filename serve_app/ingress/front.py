"""What stands before Ray Serve's own request handling: the headers by which a client would steer Serve are taken out.

Serve reads some headers before the application is called: two that turn its timeout and its cancellation off, one that
goes back in the response as it came, and some that it decodes, so that a byte that is not UTF-8 there is a 500. A
middleware of ours inside the application would be too late. Serve takes middlewares that run before all this from the
function that `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names: in each ingress replica where HAProxy is on, in the
Python proxy where it is off. `serve_config.yaml` names `serve_app.ingress.front:middlewares`.
"""

from __future__ import annotations

import os
import re
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""Request ids that may go into responses and logs; any other is replaced."""

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


class Front:
    """Passes on each request with exactly one harmless request id, and without `TAKEN_OUT`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope["headers"] = cleaned(scope["headers"])
        await self._app(scope, receive, send)


def cleaned(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`headers` as Serve and the application may see them; names are in lower case, as ASGI has them."""
    kept = [header for header in headers if header[0] not in TAKEN_OUT]
    ids = [value for name, value in kept if name == _ID_HEADER]
    if len(ids) == 1 and REQUEST_ID.fullmatch(ids[0]):
        return kept
    if ids:
        kept = [header for header in kept if header[0] != _ID_HEADER]
    kept.append((_ID_HEADER, uuid.uuid4().hex.encode()))
    return kept


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for once in each process that answers HTTP."""
    return [Middleware(Front)]

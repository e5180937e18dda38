"""The HTTP edge as one ASGI application: a request in, its route found, a reply out. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import AsyncGenerator

from starlette.types import Receive, Scope, Send

from serve_app.errors import MethodNotAllowedError, OverloadedError, ServeAppError, ServerError, UnauthorizedError
from serve_app.ingress import operations, pages
from serve_app.ingress.access import Guard
from serve_app.ingress.access_log import log_request
from serve_app.ingress.deadlines import TIMEOUT, asked_timeout_s
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import ClientDisconnectedError, Exchange, Header, Reply
from serve_app.ingress.front import REQUEST_ID
from serve_app.ingress.protocols import huggingface, open_inference, openai, tei
from serve_app.ingress.routes import Dialect, Route, RouteTable, route_path
from serve_app.ingress.service import Service, SettingsRef
from serve_app.ingress.statuses import kind_of

logger = logging.getLogger(__name__)

_LINGER_S = 2.0
"""How long the rest of a refused body is read and thrown away before the connection is closed. Closing at once would
reset the connection and take the reply from clients that are still sending."""

_COME_BACK = frozenset({429, 503})
"""Statuses that tell the client, in `retry-after`, when to come back."""


def create_app(
    service: Service, settings: SettingsRef, *, writes_request_id: bool = True, guard: Guard | None = None
) -> App:
    """The application over `service`, open to all unless there is a `guard`.

    `writes_request_id` is False behind a server that writes `x-request-id` on every response itself, as Ray Serve's
    HTTP server does.
    """
    return App(service, settings, writes_request_id, guard)


class App:
    """ASGI 3: http and lifespan; a websocket is refused."""

    def __init__(self, service: Service, settings: SettingsRef, writes_request_id: bool, guard: Guard | None) -> None:
        self._service = service
        self._settings = settings
        self._writes_request_id = writes_request_id
        self._guard = guard
        self._under_way = 0
        api = (*tei.routes(), *huggingface.routes(), *openai.routes(), *open_inference.routes(), *operations.routes())
        self._table = RouteTable((*api, *pages.routes(api, service.models)))

    @property
    def routes(self) -> tuple[Route, ...]:
        """Ray Serve reads these to name the route of each request in its metrics."""
        return self._table.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange(scope, receive)
        try:
            await self._send(exchange, await self._reply(exchange), send)
        except ClientDisconnectedError:
            return
        finally:
            self._under_way -= exchange.counted
            if exchange.account is not None:
                exchange.account.charge(exchange.tokens)
            if exchange.settings.log_requests:
                log_request(exchange)

    def _exchange(self, scope: Scope, receive: Receive) -> Exchange:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"")
        request_id = asked.decode() if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        settings = self._settings.current
        return Exchange(
            request_id, scope, receive, headers, self._service, settings, timeout_s=settings.request_timeout_s
        )

    async def _reply(self, exchange: Exchange) -> Reply:
        """The route's reply, or the error's in the shape of its protocol. Raises ClientDisconnectedError."""
        path = route_path(exchange.scope)
        dialect = dialect_of(path)
        try:
            route, exchange.path_model = self._table.find(exchange.scope["method"], path)
            dialect, exchange.route = route.dialect, (route.method, route.path)
            if self._guard is not None and route.role is not None:
                exchange.account = self._guard.admit(exchange.headers, route.role)
                if route.body is not None:
                    exchange.account.enter()
            if TIMEOUT in exchange.headers and route.body is not None:
                exchange.timeout_s = asked_timeout_s(exchange.headers[TIMEOUT], exchange.timeout_s)
            if route.body is not None:
                self._enter(exchange)
            return await route.endpoint(exchange)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            return self._refusal(error, exchange, dialect, path)

    def _enter(self, exchange: Exchange) -> None:
        """Count a request with a body, until its answer is sent. Raises OverloadedError if too many are under way."""
        most = exchange.settings.max_concurrent_requests
        if self._under_way >= most:
            raise OverloadedError(f"{most} requests are under way here; come back later", retry_after_s=1.0)
        self._under_way += 1
        exchange.counted = True

    def _refusal(self, error: Exception, exchange: Exchange, dialect: Dialect, path: str) -> Reply:
        """The reply to a request that failed with `error`."""
        if not isinstance(error, ServeAppError):
            logger.error("unexpected error in request %s", exchange.id, exc_info=error)
            error = ServerError("an unexpected error; the server's log has it under this request id")
        exchange.code = error.code
        headers: tuple[Header, ...] = ()
        if isinstance(error, MethodNotAllowedError):
            headers = ((b"allow", self._table.allowed(path).encode()),)
        elif isinstance(error, UnauthorizedError):
            headers = ((b"www-authenticate", b"Bearer"),)
        return error_reply(error, dialect, exchange.id, *headers)

    async def _send(self, exchange: Exchange, reply: Reply, send: Send) -> None:
        exchange.status = reply.status
        headers = [(b"content-type", reply.content_type), *reply.headers]
        if self._writes_request_id:
            headers.append((b"x-request-id", exchange.id.encode()))
        if not isinstance(reply.body, bytes):
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await _send_parts(reply.body, send)
            return
        headers.append((b"content-length", b"%d" % len(reply.body)))
        lingers = exchange.body_is_unread
        if lingers:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body, "more_body": lingers})
        if lingers:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_drain(exchange.receive), _LINGER_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_parts(parts: AsyncGenerator[bytes, None], send: Send) -> None:
    async with contextlib.aclosing(parts):
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_reply(error: ServeAppError, dialect: Dialect, request_id: str, *headers: Header) -> Reply:
    kind = kind_of(error)
    if kind.status in _COME_BACK:
        headers = (*headers, (b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s or 1))))
    return Reply(encode(dialect.write_error(error, kind, request_id)), kind.status, headers=headers)


def dialect_of(path: str) -> Dialect:
    """The protocol that a path without a route most likely meant."""
    if path.startswith("/v2/"):
        return open_inference.DIALECT
    return openai.DIALECT if "/v1/" in path else tei.DIALECT


async def _drain(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

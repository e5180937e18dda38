"""The HTTP edge as one ASGI application: a request in, its route found, a reply out. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.types import Message, Receive, Scope, Send

from serve_app.errors import MethodNotAllowedError, UnauthorizedError
from serve_app.ingress import operations, pages
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.door import Door, request_id_of
from serve_app.ingress.exchange import ClientDisconnectedError, Exchange, Header, Reply
from serve_app.ingress.protocols import huggingface, open_inference, openai, tei
from serve_app.ingress.refusals import dialect_of, error_reply
from serve_app.ingress.routes import Route, RouteTable, route_path
from serve_app.ingress.service import Service, SettingsRef
from serve_app.ingress.writing import Writer, part, unchunked, write_whole
from serve_app.timeouts import within

_LINGER_S = 2.0
"""How long the rest of a refused body is read and thrown away before the connection is closed. Closing at once would
reset the connection and take the reply from clients that are still sending."""


def create_app(
    service: Service, settings: SettingsRef, *, writes_request_id: bool = True, door: Door | None = None
) -> App:
    """The application over `service`, behind a `door` that is open to all unless another is given.

    `writes_request_id` is False behind a server that writes `x-request-id` on every response itself, as Ray Serve's
    HTTP server does.
    """
    return App(service, settings, writes_request_id, door or Door())


class App:
    """ASGI 3: http and lifespan; a websocket is refused."""

    def __init__(self, service: Service, settings: SettingsRef, writes_request_id: bool, door: Door) -> None:
        self._service = service
        self._settings = settings
        self._writes_request_id = writes_request_id
        self._door = door
        api = (*tei.routes(), *huggingface.routes(), *openai.routes(), *open_inference.routes(), *operations.routes())
        documentation = pages.routes(api, asks_keys=door.guard is not None)
        self._table = RouteTable((*api, *open_inference.unsupported.routes(), *documentation))

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
        with contextlib.suppress(ClientDisconnectedError), self._door.visited(exchange):
            reply = await self._reply(exchange)
            await self._answer(exchange, reply, Writer(exchange, unchunked(scope, send)))

    def _exchange(self, scope: Scope, receive: Receive) -> Exchange:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        settings = self._settings.current
        return Exchange(
            id=request_id_of(headers),
            headers=headers,
            service=self._service,
            settings=settings,
            timeout_s=settings.request_timeout_s,
            bodies=self._door.bodies,
            scope=scope,
            receive=receive,
        )

    async def _reply(self, exchange: Exchange) -> Reply:
        """The route's reply, or the error's in the shape of its protocol. Raises ClientDisconnectedError."""
        path = route_path(exchange.scope)
        dialect = dialect_of(path)
        try:
            route, exchange.path_model = self._table.find(exchange.scope["method"], path)
            dialect, exchange.route = route.dialect, (route.method, route.path)
            exchange.is_counted = route.method == "POST"
            self._door.admit(exchange, route.role, route.kind)
            return await route.endpoint(exchange)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            return self._refusal(error, exchange, exchange.dialect or dialect, path)

    def _refusal(self, error: Exception, exchange: Exchange, dialect: Dialect, path: str) -> Reply:
        """The reply to a request that failed with `error`."""
        headers: tuple[Header, ...] = ()
        if isinstance(error, MethodNotAllowedError):
            headers = ((b"allow", self._table.allowed(path).encode()),)
        elif isinstance(error, UnauthorizedError):
            headers = ((b"www-authenticate", b"Bearer"),)
        return error_reply(exchange.expected(error), dialect, exchange.id, *headers)

    async def _answer(self, exchange: Exchange, reply: Reply, write: Writer) -> None:
        """Raises ClientDisconnectedError; a server closes the connection of an answer that was begun and not ended."""
        headers = [(b"content-type", reply.content_type), *reply.headers]
        if self._writes_request_id:
            headers.append((b"x-request-id", exchange.id.encode()))
        start = {"type": "http.response.start", "status": reply.status, "headers": headers}
        if not isinstance(reply.body, bytes):
            await _write_parts(write, start, reply.body)
            exchange.status = reply.status
            return
        headers.append((b"content-length", b"%d" % len(reply.body)))
        if not exchange.body_is_unread:
            await write_whole(write, start, reply.body)
            exchange.status = reply.status
            return
        headers.append((b"connection", b"close"))
        await write(start, part(reply.body, more=True))
        exchange.status = reply.status
        self._door.leave(exchange)
        with contextlib.suppress(asyncio.TimeoutError):
            await within(_drain(exchange.receive), _LINGER_S)
        await write(part(b"", more=False))


async def _write_parts(write: Writer, start: Message, parts: AsyncGenerator[bytes, None]) -> None:
    async with contextlib.aclosing(parts):
        await write(start)
        async for each in parts:
            await write(part(each, more=True))
    await write(part(b"", more=False))


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

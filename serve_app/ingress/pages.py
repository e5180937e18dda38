"""The documentation: the OpenAPI document, and a page that shows it and needs nothing from the network."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from importlib.resources import files

from serve_app.ingress import openapi
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Exchange, Reply
from serve_app.ingress.operations import DIALECT
from serve_app.ingress.routes import Endpoint, Route
from serve_app.ingress.single_flight import SingleFlight

_SAFE = (
    (b"content-security-policy", b"default-src 'self'; img-src data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)
_FILES = (
    ("/docs", "docs.html", "text/html; charset=utf-8"),
    ("/docs/docs.css", "docs.css", "text/css; charset=utf-8"),
    ("/docs/docs.js", "docs.js", "text/javascript; charset=utf-8"),
)


def routes(documented: Sequence[Route], *, asks_keys: bool) -> tuple[Route, ...]:
    """Routes of the documentation of `documented`, which are not in the document themselves."""
    pages = (
        Route("GET", path, _page(name, media), DIALECT, name, media=media, role=None) for path, name, media in _FILES
    )
    return (
        Route("GET", "/openapi.json", _Document(documented, asks_keys), DIALECT, "This document", role=None),
        Route("GET", "/", _to_docs, DIALECT, "To the documentation", role=None),
        *pages,
    )


class _Document:
    """The OpenAPI document, written anew in a thread when other models are served."""

    def __init__(self, documented: Sequence[Route], asks_keys: bool) -> None:
        self._describe = partial(openapi.describe, documented, asks_keys=asks_keys)
        self._models: tuple[str, ...] = ()
        self._written: SingleFlight[Reply] | None = None

    async def __call__(self, exchange: Exchange) -> Reply:
        models = (*exchange.service.models, *exchange.service.aliases)
        if self._written is None or models != self._models:
            self._models = models
            self._written = SingleFlight(partial(asyncio.to_thread, self._write, models), math.inf)
        return await self._written()

    def _write(self, models: tuple[str, ...]) -> Reply:
        return Reply(encode(self._describe(models=models)))


def _page(name: str, media: str) -> Endpoint:
    content = (files("serve_app.ingress") / "static" / name).read_bytes()
    return _always(Reply(content, content_type=media.encode(), headers=_SAFE))


def _always(reply: Reply) -> Endpoint:
    async def endpoint(exchange: Exchange) -> Reply:
        return reply

    return endpoint


async def _to_docs(exchange: Exchange) -> Reply:
    root: str = exchange.scope.get("root_path", "")
    return Reply(b"", status=307, headers=((b"location", f"{root}/docs".encode()),))

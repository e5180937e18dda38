"""The documentation: the OpenAPI document, and a page that shows it and needs nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from serve_app.ingress import openapi
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Exchange, Reply
from serve_app.ingress.operations import DIALECT
from serve_app.ingress.routes import Endpoint, Route

_SAFE = (
    (b"content-security-policy", b"default-src 'self'; img-src data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)
_FILES = (
    ("/docs", "docs.html", "text/html; charset=utf-8"),
    ("/docs/docs.css", "docs.css", "text/css; charset=utf-8"),
    ("/docs/docs.js", "docs.js", "text/javascript; charset=utf-8"),
)


def routes(documented: Sequence[Route], models: Sequence[str], *, asks_keys: bool) -> tuple[Route, ...]:
    """Routes of the documentation of `documented`, which are not in the document themselves."""
    pages = (
        Route("GET", path, _page(name, media), DIALECT, name, media=media, role=None) for path, name, media in _FILES
    )
    return (
        Route("GET", "/openapi.json", _document(documented, models, asks_keys), DIALECT, "This document", role=None),
        Route("GET", "/", _to_docs, DIALECT, "To the documentation", role=None),
        *pages,
    )


def _document(documented: Sequence[Route], models: Sequence[str], asks_keys: bool) -> Endpoint:
    @cache
    def written() -> Reply:
        return Reply(encode(openapi.describe(documented, models, asks_keys=asks_keys)))

    async def endpoint(exchange: Exchange) -> Reply:
        return written()

    return endpoint


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

"""The table of routes, and the way from a path to one of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote

from starlette.routing import Match
from starlette.types import Scope

from serve_app.errors import MethodNotAllowedError, RouteNotFoundError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.exchange import Exchange, Reply
from serve_app.ingress.keys import Role

Endpoint: TypeAlias = Callable[[Exchange], Awaitable[Reply]]
Method: TypeAlias = Literal["GET", "POST"]
Kind: TypeAlias = Literal["inference", "question", "page"]
"""What a request takes: a body is read and computed; replicas or nodes are asked about themselves, which may take
seconds; or the answer is there.
"""

_PARAMETER = "{name}"
_SLASH = "%2F"
"""Of a model's name, in a path."""
ANY_MODEL = ("", f"/models/{_PARAMETER}")
"""Where a route about one model is found: at the root, for the only model, and below each model's own path."""

COMPUTE_FAILURES = (400, 404, 408, 413, 415, 422, 424, 429, 503, 504)
"""Statuses of the errors of routes that read a body and compute."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path; all of it but `endpoint` is also what the documentation is made of.

    `path` may have one parameter, the model, as a whole segment: `/models/{name}/embed`.
    """

    method: Method
    path: str
    endpoint: Endpoint
    dialect: Dialect
    summary: str
    answer: Any = None
    """Type of the JSON answer; None where the answer is not JSON."""
    body: Any = None
    """What the JSON body is read with, or a union where the model's task decides; None where there is no body."""
    streams: bool = False
    """Whether the answer comes as server-sent events where the body asks for it."""
    binary: str = ""
    """What a body, or an answer, of `application/octet-stream` is; empty where there is none."""
    costs: bool = True
    """Whether the answer to a body says in its headers what it cost."""
    media: str = "application/json"
    failures: tuple[int, ...] = ()
    """Statuses of the errors that the endpoint may answer, beside 500."""
    description: str = ""
    role: Role | None = "inference"
    """What an API key must be for, where keys are on; None: no key is asked."""

    @property
    def kind(self) -> Kind:
        if self.body is not None:
            return "inference"
        return "question" if HTTPStatus.GATEWAY_TIMEOUT in self.failures else "page"

    @property
    def methods(self) -> frozenset[str]:
        return frozenset({self.method, "HEAD"} if self.method == "GET" else {self.method})

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As Starlette's routes do: Ray Serve names the route of each request by it, in its metrics."""
        prefix, _, suffix = self.path.partition(_PARAMETER)
        path = route_path(scope)
        if path != self.path and not (_PARAMETER in self.path and _parameter(path, prefix, suffix)):
            return Match.NONE, {}
        return (Match.FULL if scope["method"] in self.methods else Match.PARTIAL), {}


Methods: TypeAlias = dict[str, Route]


class RouteTable:
    """Finds the route of a request in a time that does not grow with the number of routes."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._fixed: dict[str, Methods] = {}
        self._named: dict[str, dict[str, Methods]] = {}
        for route in self.routes:
            self._add(route)

    def _add(self, route: Route) -> None:
        prefix, parameter, suffix = route.path.partition(_PARAMETER)
        where = self._named.setdefault(prefix, {}) if parameter else self._fixed
        methods = where.setdefault(suffix if parameter else prefix, {})
        if not methods.keys().isdisjoint(route.methods):
            raise ValueError(f"{route.method} {route.path} is in the table twice")
        methods.update(dict.fromkeys(route.methods, route))

    def find(self, method: str, path: str) -> tuple[Route, str | None]:
        """The route, and the model that the path names. Raises RouteNotFoundError or MethodNotAllowedError."""
        methods, name = self._methods(path)
        if not methods:
            raise RouteNotFoundError("there is no such path here; /docs lists those there are")
        route = methods.get(method)
        if route is None:
            raise MethodNotAllowedError(f"this path takes {self.allowed(path)} only")
        return route, None if name is None else name.replace(_SLASH, "/")

    def allowed(self, path: str) -> str:
        """The methods of a path, as the header `Allow` has them; empty if there is no such path."""
        return ", ".join(sorted(self._methods(path)[0]))

    def _methods(self, path: str) -> tuple[Methods, str | None]:
        methods = self._fixed.get(path)
        if methods is not None:
            return methods, None
        for prefix, suffixes in self._named.items():
            if path.startswith(prefix):
                name, slash, rest = path[len(prefix) :].partition("/")
                methods = suffixes.get(slash + rest)
                if methods is not None and name:
                    return methods, name
        return {}, None


def route_path(scope: Scope) -> str:
    """The path below the application's root, without a slash at the end.

    A slash that was sent as %2F, which is part of a name, still is one.
    """
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or b""
    if b"%2f" in raw.lower():
        path = unquote(re.sub(rb"%2f", b"%252F", raw.partition(b"?")[0], flags=re.IGNORECASE).decode("latin-1"))
    root: str = scope.get("root_path", "")
    if root and path.startswith(root):
        path = path[len(root) :]
    return path.rstrip("/") or "/"


def _parameter(path: str, prefix: str, suffix: str) -> str:
    """What stands between prefix and suffix if that is one whole segment, else the empty string."""
    if not (path.startswith(prefix) and path.endswith(suffix) and len(path) > len(prefix) + len(suffix)):
        return ""
    name = path[len(prefix) : len(path) - len(suffix)]
    return "" if "/" in name else name

"""The OpenAPI document, made from the table of routes and the models that validate the bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter

from serve_app import __version__
from serve_app.ingress.asked import TIMEOUT
from serve_app.ingress.encoding import encode
from serve_app.ingress.routes import Route

Json: TypeAlias = dict[str, Any]
Direction: TypeAlias = Literal["validation", "serialization"]

_REFERENCE = "#/components/schemas/{model}"
_DESCRIPTION = (
    "Every response has the header `x-request-id`: the client's own, if it sent one of 1 to 128 letters, digits, dots, "
    "dashes and underscores. Errors have a stable `code` and never repeat the input. Fields that a body does not know "
    "are ignored, but for parameters of text2text generation, summarization and translation, which are refused."
)
_COST_HEADERS = {
    "x-compute-type": "What the model runs on: cpu or gpu.",
    "x-compute-characters": "Characters of all inputs; a token id counts as one.",
    "x-compute-tokens": "Tokens computed, special tokens included.",
    "x-total-time": "Milliseconds from the request's arrival to its answer.",
    "x-tokenization-time": "Milliseconds of tokenizing.",
    "x-queue-time": "Milliseconds of waiting for the model.",
    "x-inference-time": "Milliseconds of the forward pass.",
    "x-truncated-inputs": "How many inputs were cut because they are too long.",
    "x-windows": "How many windows were computed for inputs that are read in several.",
    "server-timing": "The same times, with decimals.",
    "x-model-revision": "Revision of the model files that made the answer.",
    "x-model-version": "Fingerprint of the model's files, configuration and software, as in /info.",
}
_TIMEOUT_PARAMETER: Json = {
    "name": TIMEOUT.decode(),
    "in": "header",
    "required": False,
    "description": "Milliseconds from the request's arrival to its answer; then 504. At most what the server allows.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999_999},
}
_EVENTS = "Where the body says `stream: true`: server-sent events, each with the next piece of the answer as JSON."


_KEYS: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of this server."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
}
_KEYS_ASKED = (
    "An API key is asked for, but for health, readiness and this documentation, in either of two headers: "
    "`Authorization: Bearer <key>` or `x-api-key: <key>`. The forms of the page /docs send none; their curl commands "
    "have a place for it."
)
_NO_KEYS_ASKED = "No API key is asked for; one that is sent is not looked at."


def describe(routes: Sequence[Route], models: Sequence[str], *, asks_keys: bool = False) -> Json:
    """The OpenAPI 3.1 document of these routes, for a server of these models.

    `asks_keys`: whether routes that have a role ask for an API key.
    """
    schemas, components = _schemas(routes)
    paths: dict[str, Json] = {}
    for route in routes:
        operation = _operation(route, models, schemas)
        if asks_keys and route.role is not None:
            operation["security"] = [{name: []} for name in _KEYS]
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    security = {"securitySchemes": _KEYS} if asks_keys else {}
    description = f"{_DESCRIPTION} {_KEYS_ASKED if asks_keys else _NO_KEYS_ASKED}"
    return {
        "openapi": "3.1.0",
        "info": {"title": "serve-app", "version": __version__, "description": description},
        "servers": [{"url": "./"}],
        "tags": [{"name": name} for name in dict.fromkeys(route.dialect.name for route in routes)],
        "paths": paths,
        "components": {"schemas": _referenced(components, paths), **security},
    }


def _schemas(routes: Iterable[Route]) -> tuple[Mapping[tuple[Any, Direction], Json], Json]:
    """The schema of every body, answer and error, by type and direction, and the components that they refer to."""
    wanted: dict[tuple[Any, Direction], TypeAdapter[Any]] = {}
    for route in routes:
        uses: tuple[tuple[Any, Direction], ...] = (
            (route.body, "validation"),
            (route.answer, "serialization"),
            (route.dialect.error_model, "serialization"),
        )
        for kind, direction in uses:
            if kind is not None:
                wanted.setdefault((kind, direction), TypeAdapter(kind))
    inputs = [(key, key[1], adapter) for key, adapter in wanted.items()]
    found, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE)
    return {key: schema for (key, _), schema in found.items()}, definitions.get("$defs", {})


def _referenced(components: Json, paths: Json) -> Json:
    """Pydantic also defines what stands behind the fields that we describe ourselves; that is left out."""
    found: Json = {}
    wanted = _references(paths)
    while wanted:
        name = wanted.pop()
        found[name] = components[name]
        wanted |= _references(components[name]) - found.keys()
    return {name: found[name] for name in components if name in found}


def _references(value: Json) -> set[str]:
    return set(re.findall(r'"#/components/schemas/([^"]+)"', encode(value).decode()))


def _operation(route: Route, models: Sequence[str], schemas: Mapping[tuple[Any, Direction], Json]) -> Json:
    operation: Json = {
        "operationId": _operation_id(route),
        "tags": [route.dialect.name],
        "summary": route.summary,
        "responses": _responses(route, schemas),
    }
    if route.description:
        operation["description"] = route.description
    parameters = [_model_parameter(models)] if "{name}" in route.path else []
    if route.body is not None:
        parameters.append(_TIMEOUT_PARAMETER)
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[route.body, "validation"]}, **_octets(route)},
        }
    return operation


def _operation_id(route: Route) -> str:
    words = re.findall(r"\w+", route.path.replace("{name}", "model"))
    return "_".join([route.method.lower(), *words]) if words else f"{route.method.lower()}_root"


def _model_parameter(models: Sequence[str]) -> Json:
    return {
        "name": "name",
        "in": "path",
        "required": True,
        "description": "Name of the model, or one of its aliases.",
        "schema": {"type": "string", "enum": list(models)} if models else {"type": "string"},
    }


def _octets(route: Route) -> Json:
    return {"application/octet-stream": {"schema": {"description": route.binary}}} if route.binary else {}


def _responses(route: Route, schemas: Mapping[tuple[Any, Direction], Json]) -> Json:
    media = route.media.partition(";")[0]
    answer = {"type": "string"} if route.answer is None else schemas[route.answer, "serialization"]
    good: Json = {"description": "OK", "content": {media: {"schema": answer}}}
    if route.streams:
        good["content"]["text/event-stream"] = {"schema": {"description": _EVENTS}}
    good["content"] |= _octets(route)
    if route.body is not None and route.costs:
        good["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in _COST_HEADERS.items()
        }
    error = {"application/json": {"schema": schemas[route.dialect.error_model, "serialization"]}}
    failures = {
        str(status): {"description": HTTPStatus(status).phrase, "content": error}
        for status in sorted({*_statuses(route), *((401, 403) if route.role is not None else ()), 500})
    }
    return {"200": good, **failures}


def _statuses(route: Route) -> Iterator[int]:
    """Of the route's failures, as its protocol tells them."""
    for status in route.failures:
        yield route.dialect.unprocessable if status == 422 else status

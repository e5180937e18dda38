"""What a body can make the edge do is bounded by its schema, whatever its bytes spell."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.config import IngressSettings
from serve_app.ingress.body import parse_body
from serve_app.ingress.protocols.fields import Body
from serve_app.ingress.protocols.open_inference.http import InferBody
from serve_app.ingress.protocols.openai.chat import ChatBody
from serve_app.ingress.protocols.task_options import EntityFields
from tests.ingress.edge import FakeService, client_of
from tests.ingress.test_openapi import DOCUMENT, POSTS, body_schema_of

MIB = 2**20


def lists_in(schema: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every list that a body of this schema may have; what is referred to is looked at under its own name."""
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from lists_in(each, f"{where}[{index}]")
    elif isinstance(schema, dict):
        if schema.get("type") == "array":
            yield where, schema
        for key, value in schema.items():
            if key != "examples":
                yield from lists_in(value, f"{where}.{key}")


def schemas_of_bodies() -> dict[str, Any]:
    """Of every route's body, and of all that they are made of, by name."""
    found: dict[str, Any] = {}
    missing = [body_schema_of(path) | {"components": None} for path in POSTS]
    while missing:
        for reference in references_in(missing.pop()):
            if reference not in found:
                found[reference] = DOCUMENT["components"]["schemas"][reference]
                missing.append(found[reference])
    return found


def references_in(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rsplit("/", 1)[1]
        for value in schema.values():
            yield from references_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references_in(value)


@pytest.mark.parametrize("name", sorted(schemas_of_bodies()))
def test_every_list_of_every_body_has_a_bound_that_its_schema_tells(name: str) -> None:
    for where, schema in lists_in(schemas_of_bodies()[name], name):
        assert "maxItems" in schema, where


def test_the_walk_finds_the_lists_that_there_are() -> None:
    lists = [where for name, schema in schemas_of_bodies().items() for where, _ in lists_in(schema, name)]
    assert any(where.startswith("TensorBody.properties.shape") for where in lists)
    assert any(where.startswith("EmbedBody.properties.inputs") for where in lists)
    assert any(where.startswith("Message.properties.content") for where in lists)


def every_body() -> list[type[Body]]:
    def below(cls: type[Body]) -> Iterator[type[Body]]:
        for each in cls.__subclasses__():
            yield each
            yield from below(each)

    return sorted(set(below(Body)), key=lambda cls: cls.__name__)


def lists_of_core(schema: Any) -> Iterator[dict[str, Any]]:
    """Those that pydantic looks through itself; readers of our own, which make our types, raise at the first error."""
    if isinstance(schema, dict):
        if schema.get("type") in ("function-plain", "dataclass"):
            return
        if schema.get("type") in ("list", "tuple", "set", "frozenset"):
            yield schema
        for value in schema.values():
            yield from lists_of_core(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from lists_of_core(value)


@pytest.mark.parametrize("body", every_body(), ids=lambda cls: cls.__name__)
def test_no_list_of_any_body_is_looked_through_for_further_errors(body: type[Body]) -> None:
    for schema in lists_of_core(body.__pydantic_core_schema__):
        assert "max_length" in schema
        assert schema.get("fail_fast") or schema["items_schema"]["type"] == "any"


HOSTILE = {
    "tensors": (InferBody, b'{"inputs":[%s]}' % b",".join([b"{}"] * 300_000)),
    "outputs": (InferBody, b'{"inputs":[],"outputs":[%s]}' % b",".join([b"{}"] * 300_000)),
    "dimensions": (
        InferBody,
        b'{"inputs":[{"name":"a","datatype":"BYTES","shape":[%s]}]}' % b",".join([b"-1"] * 300_000),
    ),
    "labels": (EntityFields, b'{"ignore_labels":[%s]}' % b",".join([b"1"] * 500_000)),
    "parts": (ChatBody, b'{"messages":[{"role":"user","content":[%s]}]}' % b",".join([b"{}"] * 300_000)),
    "turns": (ChatBody, b'{"messages":[%s]}' % b",".join([b"{}"] * 300_000)),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_body_of_nothing_but_errors_costs_no_list_of_them(case: str) -> None:
    body, raw = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match=r"^`"):
            parse_body(body, raw, IngressSettings())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB


MANY: dict[str, dict[str, Any]] = {
    "/embed": {"inputs": [[1]] * 3},
    "/v1/embeddings": {"input": ["a", [1], {}]},
    "/rerank": {"query": "a", "texts": ["a", "b", {}]},
    "/v1/rerank": {"query": "a", "documents": [{"text": "a"}, "b", 1]},
    "/predict": {"inputs": [["a"], [1], ["a"]]},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["a", "b", 1]}},
    "/tokenize": {"inputs": ["a", "b", 1]},
    "/decode": {"ids": [[1], [2], 1]},
}


@pytest.mark.parametrize("path", MANY)
async def test_more_inputs_than_are_allowed_are_refused_before_they_are_read(path: str) -> None:
    service = FakeService()
    async with client_of(service, max_client_batch_size=2) as client:
        response = await client.post(path, json=MANY[path])
    assert response.status_code == (400 if path.startswith("/v1/") else 422)
    assert "3 items, and 2 are allowed" in response.text
    assert service.requests == []


async def test_a_list_of_numbers_is_one_input_however_many_they_are(client: httpx.AsyncClient) -> None:
    response = await client.post("/embed", json={"inputs": [1] * 5000})
    assert response.status_code == 200

"""How deep a body is, told without parsing it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import IngressSettings
from serve_app.errors import MalformedRequestError
from serve_app.ingress.depth import check_nesting, depth_of, parts_allowed
from tests.ingress.edge import FakeService, client_of

JSON = st.recursive(
    st.none() | st.integers() | st.text('ab"\\[]{}\u00e9'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{'), inner, max_size=3),
    max_leaves=20,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.booleans())
def test_the_depth_is_that_of_the_parsed_value(value: Any, ascii: bool) -> None:
    assert depth_of(json.dumps(value, ensure_ascii=ascii).encode()) == depth(value)


@pytest.mark.parametrize("limit", [1, 2, 64])
def test_a_body_at_the_limit_passes_and_one_beyond_it_does_not(limit: int) -> None:
    settings = IngressSettings(max_json_depth=limit)
    check_nesting(b"[" * limit + b"]" * limit, settings)
    check_nesting(b"[" + b"{}," * 1000 * (limit > 1) + b"1]", settings)
    with pytest.raises(MalformedRequestError, match=f"more than {limit} lists"):
        check_nesting(b'{"a":' * (limit + 1) + b"1" + b"}" * (limit + 1), settings)


def test_a_body_of_too_many_parts_is_refused_and_one_of_many_is_not() -> None:
    settings = IngressSettings(max_client_batch_size=10)
    most = parts_allowed(settings)
    check_nesting(b"[" + b",".join([b"[1]"] * (most - 1)) + b"]", settings)
    with pytest.raises(MalformedRequestError, match=f"more than {most} lists and objects"):
        check_nesting(b"[" + b",".join([b"[]", b"{}"] * (most // 2)) + b"]", settings)


def test_the_most_inputs_of_any_kind_are_not_too_many_parts() -> None:
    settings = IngressSettings()
    pairs = [{"text": "a", "text_pair": "b"}] * settings.max_client_batch_size
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 10_000
    for body in ({"inputs": pairs}, {"messages": turns}):
        check_nesting(json.dumps(body).encode(), settings)


def test_brackets_in_texts_do_not_count() -> None:
    texts = ["[" * 1000, '\\"[{' * 1000, "{}" * 500_000]
    check_nesting(json.dumps({"inputs": texts}).encode(), IngressSettings(max_json_depth=2))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "body", [b'"\\"' * 700_000, b'"' + b'\\"' * 1_000_000 + b"[" * 70, b"[" * 2_000_000, b'["\\' * 600_000]
)
def test_the_look_takes_a_time_that_is_linear_in_the_body(body: bytes) -> None:
    depth_of(body)


@pytest.mark.parametrize("path", ["/embed", "/", "/v1/embeddings", "/tokenize"])
async def test_a_body_that_is_too_deep_is_a_400_even_where_nobody_looks(service: FakeService, path: str) -> None:
    async with client_of(service, max_json_depth=5) as client:
        good = {"input" if path == "/v1/embeddings" else "inputs": "a", "metadata": [[[[1]]]]}
        assert (await client.post(path, json=good)).status_code == 200
        response = await client.post(path, json={**good, "metadata": [[[[[1]]]]]})
    assert response.status_code == 400
    assert "nested too deeply" in response.text


async def test_the_deepest_limit_is_one_that_the_parser_takes(client: httpx.AsyncClient, service: FakeService) -> None:
    nested: Any = 1
    for _ in range(189):
        nested = [nested]
    async with client_of(service, max_json_depth=190) as client:
        assert (await client.post("/embed", json={"inputs": "a", "metadata": nested})).status_code == 200

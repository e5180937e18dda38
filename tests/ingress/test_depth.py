"""How deep a body is, told without parsing it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import MalformedRequestError
from serve_app.ingress.depth import check_depth, depth_of
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
    check_depth(b"[" * limit + b"]" * limit, limit)
    check_depth(b"[" + b"{}," * 1000 * (limit > 1) + b"1]", limit)
    with pytest.raises(MalformedRequestError, match=f"more than {limit} lists"):
        check_depth(b'{"a":' * (limit + 1) + b"1" + b"}" * (limit + 1), limit)


def test_brackets_in_texts_do_not_count() -> None:
    check_depth(json.dumps({"inputs": ["[" * 1000, '\\"[{' * 1000]}).encode(), 2)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "body", [b'"\\"' * 700_000, b'"' + b'\\"' * 1_000_000 + b"[" * 70, b"[" * 2_000_000, b'["\\' * 600_000]
)
def test_the_look_takes_a_time_that_is_linear_in_the_body(body: bytes) -> None:
    depth_of(body)


@pytest.mark.parametrize("path", ["/embed", "/", "/v1/embeddings", "/tokenize"])
async def test_a_body_that_is_too_deep_is_a_400_even_where_nobody_looks(service: FakeService, path: str) -> None:
    async with client_of(service, max_json_depth=5) as client:
        good = {"inputs": "a", "input": "a", "other": [[[[1]]]]}
        assert (await client.post(path, json=good)).status_code == 200
        response = await client.post(path, json={**good, "other": [[[[[1]]]]]})
    assert response.status_code == 400
    assert "nested too deeply" in response.text


async def test_the_deepest_limit_is_one_that_the_parser_takes(client: httpx.AsyncClient, service: FakeService) -> None:
    nested: Any = 1
    for _ in range(189):
        nested = [nested]
    async with client_of(service, max_json_depth=190) as client:
        assert (await client.post("/embed", json={"inputs": "a", "other": nested})).status_code == 200

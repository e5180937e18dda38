"""OpenAI's embeddings and models."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app import errors
from serve_app.options import EmbeddingOptions, RerankOptions
from tests.ingress.edge import FakeService, client_of, unit, vector


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
async def test_every_kind_of_input_becomes_a_list_of_unit_vectors(
    client: httpx.AsyncClient, service: FakeService, given: Any, understood: tuple[Any, ...]
) -> None:
    response = await client.post("/v1/embeddings", json={"input": given, "model": "tiny"})
    answer = response.json()
    assert service.requests[0].inputs == understood
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", index) for index in range(len(understood))
    ]
    vectors = np.array([item["embedding"] for item in answer["data"]])
    np.testing.assert_allclose(vectors, unit(np.stack([vector(value) for value in understood])), rtol=1e-6)


async def test_base64_is_the_same_numbers_as_little_endian_float32(client: httpx.AsyncClient) -> None:
    body = {"input": ["a", "b"], "model": "tiny"}
    plain = (await client.post("/v1/embeddings", json=body)).json()
    packed = (await client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
    for one, other in zip(plain["data"], packed["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_array_equal(decoded, np.array(one["embedding"], np.float32))


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
async def test_fewer_dimensions_are_cut_then_scaled(client: httpx.AsyncClient, encoding_format: str) -> None:
    body = {"input": ["a", "b"], "model": "tiny", "dimensions": 4, "encoding_format": encoding_format}
    item = (await client.post("/v1/embeddings", json=body)).json()["data"][1]["embedding"]
    got = np.frombuffer(base64.b64decode(item), "<f4") if encoding_format == "base64" else np.array(item)
    np.testing.assert_allclose(got, unit(vector("b")[:4]), rtol=1e-6)


async def test_usage_counts_the_tokens(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/embeddings", json={"input": "abc", "model": "tiny"})).json()
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


async def test_the_model_may_be_left_out_where_there_is_one(client: httpx.AsyncClient, service: FakeService) -> None:
    response = await client.post("/v1/embeddings", json={"input": "a", "user": "somebody"})
    assert response.json()["model"] == "tiny"
    assert service.requests[0].options == EmbeddingOptions(True)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "tiny"}, 400, "malformed_request"),
        ({"input": [], "model": "tiny"}, 400, "empty_input"),
        ({"input": "a", "model": "tiny", "dimensions": 99}, 400, "invalid_input"),
        ({"input": "a", "model": "tiny", "encoding_format": "hex"}, 400, "malformed_request"),
    ],
)
async def test_errors_have_openais_shape(client: httpx.AsyncClient, body: Any, status: int, code: str) -> None:
    response = await client.post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


async def test_overload_tells_when_to_come_back(client: httpx.AsyncClient, service: FakeService) -> None:
    service.failure = errors.OverloadedError("the queue is full", retry_after_s=2.3)
    response = await client.post("/v1/embeddings", json={"input": "a"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "overloaded"


async def test_models_are_listed_and_told_one_by_one(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
    missing = await client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_a_models_own_path_lists_it_alone() -> None:
    async with client_of(FakeService("small", "large")) as client:
        listed = (await client.get("/models/large/v1/models")).json()
        assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", ["large"])
        assert (await client.get("/models/other/v1/models")).status_code == 404


async def test_embeddings_take_every_option_of_their_task(client: httpx.AsyncClient, service: FakeService) -> None:
    options = {"normalize": False, "prompt_name": "query", "dimensions": 4}
    texts = {"truncate": False, "truncation_direction": "Left", "stride": 3}
    for path, name in (("/v1/embeddings", "input"), ("/embed", "inputs"), ("/", "inputs")):
        response = await client.post(path, json={name: "a", **options, **texts})
        assert response.status_code == 200, response.text
        request = service.requests[-1]
        assert request.options == EmbeddingOptions(False, 4, "query")
        assert (request.long_texts, request.truncation_side, request.stride) == ("error", "left", 3)
    await client.post("/v1/embeddings", json={"input": "a", "long_texts": "windows"})
    assert service.requests[-1].long_texts == "windows"


async def test_rerank_takes_every_option_of_its_task(client: httpx.AsyncClient, service: FakeService) -> None:
    for path, name in (("/v1/rerank", "documents"), ("/v2/rerank", "documents"), ("/rerank", "texts")):
        body = {"query": "q", name: ["a"], "raw_scores": True, "truncate": True, "truncation_direction": "left"}
        assert (await client.post(path, json=body)).status_code == 200
        request = service.requests[-1]
        assert request.options == RerankOptions(raw_scores=True)
        assert (request.long_texts, request.truncation_side) == ("truncate", "left")

"""What InferenceClient posts to the very URL that it is given."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.options import EmbeddingOptions, SimilarityOptions
from tests.ingress.edge import FakeService, unit, vector

PATHS = ["/", "/models/tiny"]


@pytest.mark.parametrize("path", PATHS)
async def test_features_are_as_the_models_files_say_unless_the_client_asks(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    plain = await client.post(path, json={"inputs": "a"})
    np.testing.assert_array_equal(np.array(plain.json(), np.float32), vector("a")[None])
    scaled = await client.post(path, json={"inputs": ["a"], "normalize": True})
    np.testing.assert_allclose(scaled.json(), unit(vector("a"))[None], rtol=1e-6)
    assert service.requests[0].options == EmbeddingOptions(None)


@pytest.mark.parametrize("path", PATHS)
async def test_an_object_as_inputs_is_a_comparison(client: httpx.AsyncClient, path: str) -> None:
    inputs = {"source_sentence": "a", "sentences": ["b", "c"]}
    response = await client.post(path, json={"inputs": inputs})
    expected = [unit(vector("a")) @ unit(vector(other)) for other in ("b", "c")]
    np.testing.assert_allclose(response.json(), expected, rtol=1e-5)


@pytest.mark.parametrize("nested", [False, True], ids=["beside inputs", "in parameters"])
async def test_options_are_taken_from_both_places(
    client: httpx.AsyncClient, service: FakeService, nested: bool
) -> None:
    options: dict[str, Any] = {
        "normalize": True,
        "truncate": True,
        "truncation_direction": "left",
        "prompt_name": "query",
        "dimensions": 8,
        "encoding_format": "base64",
    }
    body = {"inputs": "a", "parameters": options} if nested else {"inputs": "a", **options}
    response = await client.post("/", json=body)
    assert np.array(response.json()).shape == (1, 8)
    request = service.requests[0]
    assert request.options == EmbeddingOptions(True, 8, "query")
    assert (request.long_texts, request.truncation_side) == ("truncate", "left")


async def test_options_beside_inputs_win(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post("/", json={"inputs": "a", "dimensions": 4, "parameters": {"dimensions": 8, "normalize": False}})
    assert service.requests[0].options == EmbeddingOptions(False, 4)


async def test_comparisons_take_the_options_about_texts(client: httpx.AsyncClient, service: FakeService) -> None:
    inputs = {"source_sentence": "a", "sentences": ["b"]}
    await client.post("/", json={"inputs": inputs, "prompt_name": "query", "truncate": False})
    assert service.requests[0].options == SimilarityOptions("query")
    assert service.requests[0].long_texts == "error"


async def test_errors_have_the_shape_that_the_client_parses(client: httpx.AsyncClient) -> None:
    response = await client.post("/", json={"inputs": []})
    assert response.status_code == 400
    assert response.json()["error_type"] == "empty"

"""huggingface_hub.InferenceClient, sync and async, pointed at the root and at a model's own path."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.answers import TEXTS, assert_same, plain


@pytest.fixture(params=["root", "model"])
def url(request: pytest.FixtureRequest, base_url: str, model: str) -> str:
    return base_url if request.param == "root" else f"{base_url}/models/{model}"


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(url, timeout=60)


def test_one_text_is_one_row(client: InferenceClient, base_url: str) -> None:
    features = client.feature_extraction(TEXTS[0], normalize=True)
    assert features.dtype == np.float32
    assert_same(features, plain(base_url, TEXTS[0]))


def test_texts_are_rows_in_their_order(client: InferenceClient, base_url: str) -> None:
    features = client.feature_extraction(TEXTS, normalize=True)
    assert_same(features, plain(base_url, TEXTS))


def test_features_are_as_the_models_files_say_where_nothing_is_asked(client: InferenceClient, base_url: str) -> None:
    assert_same(client.feature_extraction(TEXTS[0]), plain(base_url, TEXTS[0], normalize=None))


def test_every_option_of_the_client_is_taken(client: InferenceClient, base_url: str) -> None:
    features = client.feature_extraction(
        TEXTS[2],
        normalize=True,
        truncate=True,
        truncation_direction="left",
        dimensions=8,
        encoding_format="float",
    )
    expected = plain(base_url, TEXTS[2], truncate=True, truncation_direction="left", dimensions=8)
    assert_same(features, expected)
    assert features.shape == (1, 8)


def test_an_encoding_that_the_client_cannot_read_is_not_sent_to_it(client: InferenceClient, base_url: str) -> None:
    features = client.feature_extraction(TEXTS[0], normalize=True, encoding_format="base64")
    assert_same(features, plain(base_url, TEXTS[0]))


def test_sentences_are_compared(client: InferenceClient, base_url: str) -> None:
    similarities = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    vectors = plain(base_url, TEXTS)
    assert_same(similarities, vectors @ vectors[0])


def test_the_endpoint_is_healthy_and_tells_what_it_serves(url: str, info: dict[str, Any]) -> None:
    client = InferenceClient(url, provider="hf-inference", timeout=60)
    assert client.health_check()
    assert client.get_endpoint_info()["model_id"] == info["model_id"]


def test_a_refusal_reaches_the_user_with_its_reason(client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="`inputs` is empty") as caught:
        client.feature_extraction([])
    assert caught.value.response.status_code == 400
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_a_refusal_of_what_the_model_cannot_do_reaches_the_user_too(client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="dimensions") as caught:
        client.feature_extraction("a", dimensions=100_000)
    assert caught.value.response.status_code == 422


def test_a_model_that_is_not_served_is_not_found(base_url: str) -> None:
    with pytest.raises(HfHubHTTPError, match="there is:") as caught:
        InferenceClient(f"{base_url}/models/other", timeout=60).feature_extraction("a")
    assert caught.value.response.status_code == httpx.codes.NOT_FOUND


async def test_the_async_client_gets_the_same(url: str, base_url: str) -> None:
    async with AsyncInferenceClient(url, provider="hf-inference", timeout=60) as client:
        features = await client.feature_extraction(TEXTS, normalize=True)
        similarities = await client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
        assert await client.health_check()
    vectors = plain(base_url, TEXTS)
    assert_same(features, vectors)
    assert_same(similarities, vectors[1:] @ vectors[0])

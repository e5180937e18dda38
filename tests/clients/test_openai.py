"""The openai package, sync and async, with /v1 and a model's own /v1 as its base URL."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from tests.clients.answers import TEXTS, assert_same, plain


@pytest.fixture(params=["root", "model"])
def url(request: pytest.FixtureRequest, base_url: str, model: str) -> str:
    return f"{base_url}/v1" if request.param == "root" else f"{base_url}/models/{model}/v1"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="not needed", max_retries=0, timeout=60)


def test_texts_are_embedded_as_the_client_asks_by_default(client: openai.OpenAI, base_url: str, model: str) -> None:
    """Which is base64, decoded by the client."""
    answer = client.embeddings.create(model=model, input=TEXTS)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert_same([item.embedding for item in answer.data], plain(base_url, TEXTS))
    assert answer.model == model
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_floats_are_the_same_numbers_as_base64(client: openai.OpenAI, model: str) -> None:
    packed = client.embeddings.create(model=model, input=TEXTS[0])
    floats = client.embeddings.create(model=model, input=TEXTS[0], encoding_format="float")
    assert_same(floats.data[0].embedding, np.array(packed.data[0].embedding, np.float32))


def test_vectors_have_length_1(client: openai.OpenAI, model: str) -> None:
    for dimensions in (openai.omit, 8):
        vector = client.embeddings.create(model=model, input=TEXTS[0], dimensions=dimensions).data[0].embedding
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_token_ids_are_taken_one_list_or_several(client: openai.OpenAI, base_url: str, model: str) -> None:
    one = client.embeddings.create(model=model, input=[101, 7592, 102])
    several = client.embeddings.create(model=model, input=[[101, 7592, 102], [101, 2088, 102]])
    expected = plain(base_url, [[101, 7592, 102], [101, 2088, 102]])
    assert_same([item.embedding for item in several.data], expected)
    assert_same([one.data[0].embedding], expected[:1])


def test_the_only_model_answers_to_the_name_that_a_client_has_always_used(
    client: openai.OpenAI, base_url: str, model: str
) -> None:
    answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS[0])
    assert_same([answer.data[0].embedding], plain(base_url, TEXTS[:1]))
    assert answer.model == model


def test_a_model_that_is_not_served_is_not_described(base_url: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="not needed", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("text-embedding-3-small")
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_refusals_are_the_clients_own_errors(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="`input` is empty") as caught:
        client.embeddings.create(model=model, input=[])
    assert caught.value.code == "empty_input"
    with pytest.raises(openai.BadRequestError, match="dimensions") as caught:
        client.embeddings.create(model=model, input="a", dimensions=100_000)
    assert caught.value.param == "dimensions"


def test_models_are_listed(base_url: str, model: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="not needed", max_retries=0)
    assert [served.id for served in client.models.list()] == [model]
    assert client.models.retrieve(model).object == "model"


def test_a_models_own_path_lists_it(base_url: str, model: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/models/{model}/v1", api_key="not needed", max_retries=0)
    assert [served.id for served in client.models.list()] == [model]


async def test_the_async_client_gets_the_same(url: str, base_url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="not needed", max_retries=0, timeout=60) as client:
        answer = await client.embeddings.create(model=model, input=TEXTS)
    assert_same([item.embedding for item in answer.data], plain(base_url, TEXTS))

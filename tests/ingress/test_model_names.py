"""By which names a model may be asked: its own, its aliases, and any other while it is the only one."""

from __future__ import annotations

from typing import Any

import httpx
import huggingface_hub
import openai
import pytest

from tests.ingress.edge import FakeService, client_of, edge_app, served_in_thread

ALIAS = "some-org/tiny"


def aliased(*names: str, task: str = "embedding") -> FakeService:
    service = FakeService(*names, task=task)
    service.aliases = {ALIAS: service.models[0], "gpt-4o": service.models[0]}
    return service


async def posted(service: FakeService, path: str, model: str | None = None, **settings: Any) -> httpx.Response:
    body = {"input" if "/v1/" in path else "inputs": "a"} | ({} if model is None else {"model": model})
    async with client_of(service, **settings) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("model", ["small", ALIAS, "gpt-4o"])
@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", "/models/small/v1/embeddings", "/models/gpt-4o/embed"])
async def test_a_body_may_give_the_name_or_an_alias(path: str, model: str) -> None:
    service = aliased("small", "large")
    assert (await posted(service, path, model)).status_code == 200
    assert [request.model for request in service.requests] == ["small"]


@pytest.mark.parametrize("model", ["text-embedding-3-small", "tgi", "rerank-v3.5"])
async def test_the_only_model_answers_to_any_name_in_a_body_and_tells_its_own(model: str) -> None:
    answer = await posted(FakeService(), "/v1/embeddings", model)
    assert answer.json()["model"] == "tiny"


async def test_the_only_model_may_be_told_to_be_strict() -> None:
    for model, status in (("tgi", 404), ("tiny", 200), (ALIAS, 200), (None, 200)):
        answer = await posted(aliased("tiny"), "/embed", model, any_model_name=False)
        assert answer.status_code == status
    assert (await posted(aliased("tiny"), "/embed", "tgi", any_model_name=False)).json()["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/embed", "/models/small/embed"])
async def test_an_unknown_name_is_never_right_where_several_models_are_served(path: str) -> None:
    answer = await posted(aliased("small", "large"), path, "tgi")
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("names", [("tiny",), ("tiny", "large")])
@pytest.mark.parametrize("path", ["/models/tgi/embed", "/models/tgi", "/v1/models/tgi", "/v2/models/tgi/infer"])
async def test_a_name_in_a_path_must_be_right(path: str, names: tuple[str, ...]) -> None:
    async with client_of(aliased(*names)) as client:
        method = "GET" if path.startswith("/v1") else "POST"
        answer = await client.request(method, path, json={"inputs": "a"} if method == "POST" else None)
    assert answer.status_code == 404


@pytest.mark.parametrize("path", ["/models/some-org%2Ftiny/info", "/v1/models/some-org%2ftiny", "/v2/models/gpt-4o"])
async def test_a_path_may_give_an_alias_its_slash_encoded(path: str) -> None:
    async with client_of(aliased("tiny", "large")) as client:
        answer = (await client.get(path)).json()
    assert "tiny" in (answer.get("served_model_name"), answer.get("id"), answer.get("name"))


def test_the_openai_client_describes_a_model_by_its_alias() -> None:
    with served_in_thread(edge_app(aliased("tiny", "large"))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="not needed", max_retries=0)
        assert client.models.retrieve(ALIAS).id == "tiny"


@pytest.mark.parametrize("names", [("tiny",), ("tiny", "large")])
def test_the_hugging_face_client_chats_at_a_models_own_path(names: tuple[str, ...]) -> None:
    """It calls the model `dummy` there."""
    app = edge_app(aliased(*names, task="text-generation"), any_model_name=False)
    with served_in_thread(app) as url:
        client = huggingface_hub.InferenceClient(f"{url}/models/tiny", timeout=60)
        answer = client.chat_completion([{"role": "user", "content": "hello"}])
    assert (answer.model, answer.choices[0].message.content) == ("tiny", "Once upon a time")

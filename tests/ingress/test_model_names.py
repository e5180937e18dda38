"""By which names a model may be asked: its own, its aliases, any other where the path names it or it is the only one,
and none where it alone answers the task.
"""

from __future__ import annotations

from typing import Any

import httpx
import huggingface_hub
import openai
import pytest

from serve_app.ingress.inference import Inference, Streaming
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


async def test_an_unknown_name_is_never_right_where_several_models_are_served_and_the_path_names_none() -> None:
    answer = await posted(aliased("small", "large"), "/embed", "tgi")
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("model", ["tgi", "text-embedding-3-small", "http://127.0.0.1:8000/models/small"])
@pytest.mark.parametrize(
    "path", ["/models/small", "/models/small/embed", "/models/small/v1/embeddings", "/models/small/tokenize"]
)
async def test_the_path_decides_where_the_body_names_nothing_that_is_served(path: str, model: str) -> None:
    """Which is what huggingface_hub, `@huggingface/inference`, LlamaIndex, LiteLLM and Cohere's client send there."""
    service = aliased("large", "small")
    assert (await posted(service, path, model)).status_code == 200
    assert {request.model for request in service.requests} <= {"small"}
    answer = await posted(service, path, model, any_model_name=False)
    assert (answer.status_code, answer.json().get("code", "model_not_found")) == (404, "model_not_found")


@pytest.mark.parametrize("model", ["large", ALIAS])
@pytest.mark.parametrize("path", ["/models/small", "/models/small/embed", "/models/small/v1/embeddings"])
async def test_a_path_and_a_body_that_name_two_served_models_are_refused(path: str, model: str) -> None:
    service = aliased("large", "small")
    answer = await posted(service, path, model)
    assert answer.status_code == 404
    assert "this path is of model small" in answer.text
    assert service.requests == []


OF_EACH_TASK = {
    "vectors": "embedding",
    "sparse": "sparse-embedding",
    "labels": "text-classification",
    "ranks": "rerank",
    "hypotheses": "zero-shot-classification",
    "writer": "text-generation",
}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "/embed": ("vectors", {"inputs": "a"}),
    "/embed_all": ("vectors", {"inputs": "a"}),
    "/embed_sparse": ("sparse", {"inputs": "a"}),
    "/similarity": ("vectors", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
    "/predict": ("labels", {"inputs": "a"}),
    "/rerank": ("ranks", {"query": "a", "texts": ["b"]}),
    "/embeddings": ("vectors", {"input": "a"}),
    "/v1/embeddings": ("vectors", {"input": "a"}),
    "/v1/rerank": ("ranks", {"query": "a", "documents": ["b"]}),
    "/v2/rerank": ("ranks", {"query": "a", "documents": ["b"]}),
    "/v1/completions": ("writer", {"prompt": "a"}),
    "/v1/chat/completions": ("writer", {"messages": [{"role": "user", "content": "a"}]}),
}


@pytest.mark.parametrize("path", ASKED)
async def test_the_only_model_of_a_task_is_asked_where_none_is_named(path: str) -> None:
    service = FakeService(*OF_EACH_TASK, tasks=OF_EACH_TASK)
    model, body = ASKED[path]
    async with client_of(service) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        told = await client.post(path, json={**body, "model": "absent"})
    assert [request.model for request in service.requests] == [model]
    assert told.status_code == 404


def test_every_route_of_one_task_has_its_case_above() -> None:
    routes = {
        route.path for route in edge_app(FakeService()).routes if isinstance(route.endpoint, Inference | Streaming)
    }
    assert {path for path in routes if "{name}" not in path} == set(ASKED)


@pytest.mark.parametrize(
    ("tasks", "path", "status", "told"),
    [
        ({"a": "rerank", "b": "rerank", "c": "embedding"}, "/rerank", 400, "several models answer this: a, b. Name"),
        ({"a": "embedding", "b": "fill-mask"}, "/rerank", 422, "there is: a (embedding), b (fill-mask)"),
        ({"a": "embedding", "b": "zero-shot-classification"}, "/predict", 200, ""),
        ({"a": "rerank", "b": "zero-shot-classification"}, "/predict", 400, "answer this: a, b."),
        ({"a": "embedding", "b": "fill-mask"}, "/tokenize", 400, "several models are served: a, b."),
    ],
)
async def test_where_that_is_not_one_model_the_error_names_them(
    tasks: dict[str, str], path: str, status: int, told: str
) -> None:
    async with client_of(FakeService(*tasks, tasks=tasks)) as client:
        answer = await client.post(path, json={"query": "a", "texts": ["b"]} if path == "/rerank" else {"inputs": "a"})
    assert answer.status_code == status
    assert told in answer.text


async def test_a_model_that_has_not_started_is_not_asked_and_may_be_waited_for() -> None:
    service = FakeService("vectors", "ranks", tasks=OF_EACH_TASK)
    service.starting = {"ranks"}
    async with client_of(service) as client:
        assert (await client.post("/embed", json={"inputs": "a"})).status_code == 200
        answer = await client.post("/rerank", json={"query": "a", "texts": ["b"]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


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

"""Health, readiness, information and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
from ray.exceptions import RayActorError

from serve_app.config import IngressConfig
from serve_app.errors import ModelNotFoundError, UnavailableError
from serve_app.ingress import deployment, served_model
from serve_app.ingress.deployment import Ingress
from serve_app.ingress.service import ModelInfo
from tests.ingress.edge import CARD, VERSION, FakeService, client_of
from tests.ingress.test_directory import Changing
from tests.ingress.test_openapi import schema_of
from tests.ingress.tiers import TINY, Tiers, replica_id
from tests.inprocess import in_a_replica


async def test_health_is_of_the_process_and_readiness_of_the_models(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.unready = "model tiny is loading"
    assert (await client.get("/health")).status_code == 200
    for path in ("/ready", "/models/tiny/health"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.json()["error"] == "model tiny is loading"
        assert response.headers["retry-after"] == "1"
    service.unready = None
    for path in ("/ready", "/models/tiny/health"):
        assert (await client.get(path)).json() == {"status": "ok"}


async def test_readiness_that_takes_for_ever_is_given_up(service: FakeService) -> None:
    async def never(name: str | None = None) -> None:
        await asyncio.Event().wait()

    service.ready = never  # type: ignore[method-assign]
    async with client_of(service, request_timeout_s=0.05) as client:
        assert (await client.get("/ready")).status_code == 504


async def test_info_has_teis_fields_for_the_only_model(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    expected = {
        "model_id": "some-org/tiny",
        "model_sha": "0" * 40,
        "model_dtype": "float32",
        "model_type": {"embedding": {"pooling": "mean"}},
        "max_input_length": 64,
        "max_batch_tokens": 1024,
        "max_client_batch_size": 2048,
        "auto_truncate": True,
        "max_concurrent_requests": 1000,
        "tokenization_workers": 1,
        "device": "cpu",
        "prompts": ["query"],
    }
    assert {key: info[key] for key in expected} == expected
    assert [model["served_model_name"] for model in info["models"]] == ["tiny"]
    assert (await client.get("/models/tiny/info")).json() == info


async def test_info_of_several_models_lists_them() -> None:
    async with client_of(FakeService("small", "large")) as client:
        info = (await client.get("/info")).json()
        assert [model["served_model_name"] for model in info["models"]] == ["small", "large"]
        assert "model_id" not in info
        assert (await client.get("/models/large/info")).json()["served_model_name"] == "large"


LABELS = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}


@pytest.mark.parametrize(
    ("task", "labels", "told"),
    [
        ("embedding", (), {"embedding": {"pooling": "mean"}}),
        ("sparse-embedding", (), {"embedding": {"pooling": "splade"}}),
        ("text-classification", ("no", "yes"), {"classifier": LABELS}),
        ("zero-shot-classification", ("no", "yes"), {"classifier": LABELS}),
        ("rerank", ("it",), {"reranker": {"id2label": {"0": "it"}, "label2id": {"it": 0}}}),
        ("token-classification", ("no", "yes"), {"token-classification": LABELS}),
        ("fill-mask", (), {"fill-mask": {}}),
        ("question-answering", (), {"question-answering": {}}),
        ("text-generation", (), {"text-generation": {"chat": False}}),
        ("summarization", (), {"summarization": {"chat": False}}),
    ],
)
async def test_info_tells_the_kind_of_model_in_teis_shape(
    client: httpx.AsyncClient, service: FakeService, task: str, labels: tuple[str, ...], told: Any
) -> None:
    card = replace(CARD, task=task, labels=labels, tokenizer_threads=3)

    async def described(name: str) -> ModelInfo:
        return ModelInfo(card)

    service.info = described  # type: ignore[method-assign]
    info = (await client.get("/info")).json()
    assert (info["model_type"], info["tokenization_workers"]) == (told, 3)
    jsonschema.validate(info, schema_of("/info", "get", 200), jsonschema.Draft202012Validator)


async def test_workers_of_several_models_are_added() -> None:
    async with client_of(FakeService("small", "large"), max_concurrent_requests=7) as client:
        info = (await client.get("/info")).json()
    assert (info["tokenization_workers"], info["max_concurrent_requests"]) == (2, 7)


async def test_info_before_any_replica_answered_has_what_the_files_say(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.state = None
    info = (await client.get("/info")).json()
    assert info["model_dtype"] is None
    assert info["max_input_length"] == 64


async def test_a_model_that_is_not_served_has_neither_health_nor_info(client: httpx.AsyncClient) -> None:
    for path in ("/models/other/health", "/models/other/info"):
        assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/models/{}/health",
        "/models/{}/info",
        "/models/{}/memory",
        "/v1/models/{}",
        "/v2/models/{}",
        "/v2/models/{}/ready",
    ],
)
async def test_the_name_of_a_model_that_is_not_served_does_not_come_back(service: FakeService, path: str) -> None:
    async def tell(name: str | None = None) -> Any:
        raise ModelNotFoundError(f"no {name}")

    service.card = service.ready = service.info = service.memory = tell  # type: ignore[method-assign,assignment]
    async with client_of(service) as client:
        response = await client.get(path.format("some-secret"))
    assert response.status_code == 404
    assert "some-secret" not in response.text


async def test_info_of_a_model_whose_files_are_not_read_yet_says_so(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    async def starting(name: str) -> None:
        raise UnavailableError("model tiny is starting")

    service.info = starting  # type: ignore[assignment,method-assign]
    assert (await client.get("/info")).status_code == 503


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "serve_app_requests_total 3" in response.text
    assert "ray_tasks" not in response.text


async def test_all_metrics_are_told_where_they_are_asked_for(client: httpx.AsyncClient) -> None:
    assert "ray_tasks 1" in (await client.get("/metrics?all=1")).text
    assert "ray_tasks" not in (await client.get("/metrics?all=0&other=1")).text
    for wrong in ("all=yes", "all=", "all=%FF"):
        response = await client.get(f"/metrics?{wrong}")
        assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
        assert "`all` takes 0 or 1" in response.json()["error"]


async def test_a_replicas_memory_is_text_for_a_person(client: httpx.AsyncClient) -> None:
    response = await client.get("/models/tiny/memory")
    assert response.text == "rss_bytes 1,000\n"
    assert response.headers["content-type"].startswith("text/plain")
    assert (await client.get("/models/other/memory")).status_code == 404


async def test_the_cache_tells_each_model_on_each_node(client: httpx.AsyncClient) -> None:
    [node] = (await client.get("/admin/cache")).json()["nodes"]
    assert (node["phase"], node["bytes_done"], node["seconds_left"]) == ("downloading", 50, 5.0)


async def test_models_of_which_no_version_answers_yet_are_told_by_name() -> None:
    service = FakeService("small", "large", "huge")
    service.starting = {"large", "huge"}
    async with client_of(service) as client:
        info = (await client.get("/info")).json()
    assert [model["served_model_name"] for model in info["models"]] == ["small"]
    assert info["starting"] == ["large", "huge"]
    assert "model_id" not in info, "it is not the only one"
    jsonschema.validate(info, schema_of("/info", "get", 200), jsonschema.Draft202012Validator)


async def test_info_tells_the_version_that_answers(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert (info["model_version"], info["model_sha"]) == (VERSION.fingerprint, VERSION.revision)
    assert info["starting"] == []


class Running:
    """An ingress, its directory, and a client of its edge."""

    def __init__(self) -> None:
        self.directory = Changing()
        self.ingress = Ingress(IngressConfig(), self.directory)
        app = self.ingress.__serve_build_asgi_app__()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge", timeout=30)

    def add(self, name: str, *, has_version: bool) -> Tiers:
        """A model, of which the ingress hears when it looks again."""
        self.directory.now[name] = TINY.model_copy(update={"name": name})
        tiers = self.directory.handles[name]
        if not has_version:
            tiers.tier.view.update({})
        return tiers

    async def get(self, path: str) -> tuple[int, Any]:
        response = await self.client.get(path)
        return response.status_code, response.json()


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setattr(served_model, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(served_model, "READY_FOR_S", -1.0)  # each question is a forward of its own
    monkeypatch.setattr(served_model, "PROBE_KEPT_S", 0.0)
    with in_a_replica():
        running = Running()
        yield running
        await running.client.aclose()
        if running.ingress._looking is not None:
            running.ingress._looking.cancel()


async def test_a_model_that_was_added_later_counts_for_readiness_from_its_first_version_on(running: Running) -> None:
    running.add("first", has_version=True)
    await running.ingress.check_health()
    assert await running.get("/ready") == (200, {"status": "ok"})

    second = running.add("second", has_version=False)
    await running.ingress.look()
    assert (await running.get("/ready"))[0] == 200
    assert (await running.get("/models/second/health"))[0] == 503
    _, info = await running.get("/info")
    assert ([model["served_model_name"] for model in info["models"]], info["starting"]) == (["tiny"], ["second"])

    second.tier.view.update({replica_id("b"): VERSION})
    assert (await running.get("/ready"))[0] == 200
    assert (await running.get("/info"))[1]["starting"] == []
    assert len(second.forward.calls) > 0, "it was asked"
    second.tier.view.update({})
    status, answer = await running.get("/ready")
    assert (status, answer["code"]) == (503, "unavailable")
    assert "second" in answer["error"]


async def test_a_model_that_was_there_first_counts_before_its_first_version(running: Running) -> None:
    running.add("first", has_version=True)
    second = running.add("second", has_version=False)
    await running.ingress.check_health()
    status, answer = await running.get("/ready")
    assert (status, answer["code"]) == (503, "unavailable")
    assert "second" in answer["error"]
    second.tier.view.update({replica_id("b"): VERSION})
    assert (await running.get("/ready"))[0] == 200


async def test_a_model_that_was_removed_counts_no_more(running: Running) -> None:
    running.add("first", has_version=True)
    running.add("second", has_version=False)
    await running.ingress.check_health()
    del running.directory.now["second"]
    await running.ingress.look()
    assert (await running.get("/ready"))[0] == 200
    assert (await running.get("/models/second/health"))[0] == 404


ASKED = {"/embed": {"inputs": "a"}, "/models/tiny/embed": {"inputs": "a"}, "/v1/embeddings": {"input": "a"}}


async def test_without_any_model_everything_is_to_be_tried_again(running: Running) -> None:
    await running.ingress.check_health()
    assert await running.get("/health") == (200, {"status": "ok"})
    for response in [
        await running.client.get("/ready"),
        *[await running.client.post(path, json=body) for path, body in ASKED.items()],
    ]:
        assert response.status_code == 503, response.text
        assert response.headers["retry-after"] == "1"
        assert "no model is deployed yet" in response.text
    status, info = await running.get("/info")
    assert (status, info["models"], info["starting"]) == (200, [], [])
    jsonschema.validate(info, schema_of("/info", "get", 200), jsonschema.Draft202012Validator)


async def test_an_ingress_knows_its_models_before_serve_takes_it_into_service_and_goes_on_looking(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "LOOK_S", 0.001)
    running.add("first", has_version=True)
    assert running.ingress.models == ()
    await running.ingress.check_health()
    assert running.ingress.models == ("first",)
    running.directory.failure = RayActorError()
    await asyncio.sleep(0.01)
    running.directory.failure = None
    running.add("second", has_version=True)
    while len(running.ingress.models) < 2:
        await asyncio.sleep(0.001)

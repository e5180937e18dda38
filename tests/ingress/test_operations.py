"""Health, readiness, information and metrics."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest

from serve_app.errors import ModelNotFoundError, UnavailableError
from serve_app.ingress.service import ModelInfo
from tests.ingress.edge import CARD, FakeService, client_of
from tests.ingress.test_openapi import schema_of


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


async def test_a_replicas_memory_is_text_for_a_person(client: httpx.AsyncClient) -> None:
    response = await client.get("/models/tiny/memory")
    assert response.text == "rss_bytes 1,000\n"
    assert response.headers["content-type"].startswith("text/plain")
    assert (await client.get("/models/other/memory")).status_code == 404


async def test_the_cache_tells_each_model_on_each_node(client: httpx.AsyncClient) -> None:
    [node] = (await client.get("/admin/cache")).json()["nodes"]
    assert (node["phase"], node["bytes_done"], node["seconds_left"]) == ("downloading", 50, 5.0)

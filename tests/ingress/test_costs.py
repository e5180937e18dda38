"""Every answer says in its headers what it cost; the log and the metrics say the same."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from serve_app.ingress.deployment import Ingress
from serve_app.ingress.routes import Route
from tests.ingress.edge import VERSION, FakeService, client_of, edge_app
from tests.ingress.test_access_log import Lines
from tests.ingress.test_access_log import lines as lines
from tests.ingress.test_backlog import SlowTiers
from tests.ingress.test_backlog import ingress as ingress
from tests.ingress.test_backlog import tiers as tiers
from tests.ingress.test_coalescer import replica as replica
from tests.ingress.test_openapi import example_of
from tests.ingress.tiers import Recorder

ROUTES = edge_app(FakeService()).routes
COMPUTING = [route for route in ROUTES if route.body is not None and route.costs]
STREAMING = [route for route in COMPUTING if route.streams]
TIMES = {"x-tokenization-time": "1", "x-queue-time": "2", "x-inference-time": "40"}
"""Of `tests.ingress.edge.TIMINGS`, in whole milliseconds."""


def name_of(route: Route) -> str:
    return route.path


def test_only_routes_that_compute_nothing_are_without() -> None:
    free = {route.path.removeprefix("/models/{name}") for route in ROUTES if route.body is not None and not route.costs}
    assert free == {"/tokenize", "/decode"}


@pytest.mark.parametrize("route", COMPUTING, ids=name_of)
async def test_every_route_that_computes_says_what_it_cost(service: FakeService, lines: Lines, route: Route) -> None:
    async with client_of(service, log_requests=True) as client:
        response = await client.post(route.path.replace("{name}", "tiny"), json=example_of(route.path))
    assert response.status_code == 200
    assert {name: response.headers[name] for name in TIMES} == TIMES
    assert response.headers["x-model-revision"] == VERSION.revision
    assert response.headers["x-model-version"] == VERSION.fingerprint
    timing = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert (timing["tokenize"], timing["queue"], timing["forward"]) == ("1.50", "2.50", "40.50")
    assert float(timing["total"]) >= int(response.headers["x-total-time"])
    (entry,) = lines.entries()
    assert entry["tokens"] >= int(response.headers["x-compute-tokens"]) > 0
    assert (entry["tokenize_s"], entry["queue_s"], entry["forward_s"]) == (0.0015, 0.0025, 0.0405)


@pytest.mark.parametrize("route", COMPUTING, ids=name_of)
async def test_the_headers_of_an_answer_are_those_that_are_documented(service: FakeService, route: Route) -> None:
    async with client_of(service) as client:
        response = await client.post(route.path.replace("{name}", "tiny"), json=example_of(route.path))
        document = (await client.get("/openapi.json")).json()
    documented = document["paths"][route.path]["post"]["responses"]["200"]["headers"]
    assert {"x-model-revision", "x-model-version", "server-timing"} <= set(documented) <= set(response.headers)


@pytest.mark.parametrize("route", STREAMING, ids=name_of)
async def test_a_stream_says_at_its_start_what_is_known_then(route: Route, lines: Lines) -> None:
    service = FakeService(task="text-generation")
    body = {**example_of(route.path), "stream": True}
    if "inputs" in body:
        body = {"inputs": "a", "stream": True}
    async with client_of(service, log_requests=True) as client:
        response = await client.post(route.path.replace("{name}", "tiny"), json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert {"x-compute-type", "x-compute-characters"} <= set(response.headers)
    assert response.headers["x-truncated-inputs"] == "0"
    assert response.headers["x-model-revision"] == VERSION.revision
    assert lines.entries()[0]["tokens"] == 11


async def test_metrics_tell_the_same(ingress: Ingress, tiers: SlowTiers) -> None:
    tokens, stages, requests = Recorder(), Recorder(), Recorder()
    metrics = replace(ingress._metrics, tokens=tokens, stage_seconds=stages, requests=requests)  # type: ignore[arg-type]
    ingress._door._metrics = metrics
    tiers.forward.go.set()
    ingress.reconfigure({"max_queued_tokens": 100})
    transport = httpx.ASGITransport(ingress.__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        headers = (await client.post("/embed", json={"inputs": "abcd"})).headers
    assert tokens.values == [int(headers["x-compute-tokens"])] == [4]
    tokenize_s, queue_s, forward_s, total_s = stages.values
    told = [int(headers[name]) for name in ("x-tokenization-time", "x-queue-time", "x-inference-time")]
    assert told == [int(seconds * 1e3) for seconds in (tokenize_s, queue_s, forward_s)]
    assert total_s * 1e3 <= float(headers["server-timing"].split(";dur=")[1].split(",")[0]) + 1
    assert requests.values == [1]

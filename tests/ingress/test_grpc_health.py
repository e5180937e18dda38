"""gRPC's own health service, as Kubernetes' probes ask it: of the server, and of each model."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from serve_app.config import MOST_QUESTIONS, ApiKeysConfig
from serve_app.ingress.access import Guard
from serve_app.ingress.draining import Draining
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.protocols.open_inference import grpc as edge
from serve_app.ingress.protocols.open_inference import health
from tests.ingress.edge import FakeService
from tests.ingress.test_grpc_edge import called
from tests.ingress.test_protocols_open_inference import Context, Servicer

SERVING, NOT_SERVING, UNKNOWN = health.SERVING, health.NOT_SERVING, health.SERVICE_UNKNOWN


def asking(service: str) -> Any:
    return health.HealthCheckRequest(service=service)


def check(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=health.HealthCheckResponse.FromString,
    )


def watch(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=health.HealthCheckResponse.FromString,
    )


@pytest.fixture
def service() -> FakeService:
    service = FakeService("tiny", "large")
    service.aliases = {"some-org/tiny": "tiny"}
    return service


@pytest.mark.parametrize("name", ["", "inference.GRPCInferenceService", "tiny", "large", "some-org/tiny"])
async def test_the_server_and_each_model_serve_as_long_as_they_are_ready(service: FakeService, name: str) -> None:
    async with called(service) as channel:
        assert (await check(channel)(asking(name))).status == SERVING
        service.unready = "its replicas are lost"
        assert (await check(channel)(asking(name))).status == NOT_SERVING


async def test_a_model_that_is_not_served_is_not_found(service: FakeService) -> None:
    async with called(service) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(channel)(asking("absent"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "there is: tiny, large" in str(caught.value.details())


async def test_a_server_without_models_does_not_serve() -> None:
    service = FakeService()
    service.models = ()
    service.unready = "no model is deployed yet"
    async with called(service) as channel:
        assert (await check(channel)(asking(""))).status == NOT_SERVING
        assert (await check(channel)(asking("tiny"))).status == NOT_SERVING


async def test_no_key_is_asked_and_the_places_are_those_of_questions(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYS", "alice sha256:" + "0" * 64)
    servicer = Servicer(service, Guard(KeyRing(ApiKeysConfig(environment="KEYS"))))
    assert (await servicer.Check(asking(""), Context())).status == SERVING
    responses = servicer.Watch(asking("tiny"), Context())
    assert (await anext(responses)).status == SERVING
    await responses.aclose()
    for _ in range(MOST_QUESTIONS):
        servicer.open_inference._door._questions.take(MOST_QUESTIONS, "questions")
    context = Context()
    await servicer.Check(asking(""), context)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_message_are_refused(service: FakeService) -> None:
    async with called(service) as channel:
        for kind, name in ((channel.unary_unary, "Check"), (channel.unary_stream, "Watch")):
            call = kind(f"/grpc.health.v1.Health/{name}")(b"\xff\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call if name == "Check" else await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_watch_tells_every_change_and_nothing_else(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "WATCH_S", 0.01)
    async with called(service) as channel:
        call = watch(channel)(asking("late"))
        assert (await call.read()).status == UNKNOWN
        service.models = ("tiny", "late")
        assert (await call.read()).status == SERVING
        service.unready = "its replicas are lost"
        assert (await call.read()).status == NOT_SERVING
        more = asyncio.ensure_future(call.read())
        await asyncio.wait((more,), timeout=0.1)
        assert not more.done()
        service.unready = None
        assert (await more).status == SERVING
        call.cancel()


async def test_watches_have_the_places_of_streams(service: FakeService) -> None:
    servicer = Servicer(service, max_concurrent_requests=1)
    first, context = servicer.Watch(asking(""), Context()), Context()
    assert (await anext(first)).status == SERVING
    assert [response async for response in servicer.Watch(asking(""), context)] == []
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await first.aclose()
    second = servicer.Watch(asking(""), Context())
    assert (await anext(second)).status == SERVING
    await second.aclose()


async def test_a_watch_ends_when_the_replica_stops(service: FakeService) -> None:
    async def is_stopping() -> bool:
        return True

    servicer, context = Servicer(service), Context()
    servicer.open_inference._draining = Draining(is_stopping, lambda: 60.0)
    statuses = [response.status async for response in servicer.Watch(asking(""), context)]
    assert statuses in ([], [SERVING])
    assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_a_server_for_its_own_machine_refuses_other_machines(service: FakeService) -> None:
    servicer = Servicer(service)
    servicer.open_inference.local_only = True
    context = Context()
    context.peer = lambda: "ipv4:10.0.0.7:5000"  # type: ignore[attr-defined]
    assert [response async for response in servicer.Watch(asking(""), context)] == []
    assert context.code is grpc.StatusCode.PERMISSION_DENIED
    context.code = grpc.StatusCode.OK
    await servicer.Check(asking(""), context)
    assert context.code is grpc.StatusCode.PERMISSION_DENIED

"""A gRPC call passes the same edge as an HTTP request: keys, quotas, places, deadlines, the log, what it cost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from serve_app import errors
from serve_app.config import MOST_QUESTIONS, ApiKeysConfig, IngressSettings
from serve_app.ingress.access import Guard
from serve_app.ingress.asgi import create_app
from serve_app.ingress.door import REQUEST_ID, Door
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.protocols.open_inference.grpc import add_to_server
from serve_app.ingress.service import SettingsRef
from tests.ingress.edge import VERSION, FakeService
from tests.ingress.test_access_log import KEYS, Lines
from tests.ingress.test_access_log import lines as lines
from tests.ingress.test_keys import line
from tests.ingress.test_protocols_open_inference import Context, Servicer, request_of, stream_of

INFER = "/inference.GRPCInferenceService/ModelInfer"


async def infer(service: FakeService, context: Context, guard: Guard | None = None, **settings: float) -> Any:
    return await Servicer(service, guard, **settings).ModelInfer(request_of("abc"), context)


async def test_the_request_id_is_the_clients_if_it_is_harmless(service: FakeService) -> None:
    for asked, kept in (("job-7", True), ("a b", False), ("x" * 200, False)):
        context = Context(**{"x-request-id": asked})
        await infer(service, context)
        told = context.trailing["x-request-id"]
        assert (told == asked) == kept
        assert REQUEST_ID.fullmatch(told.encode())
        assert service.requests[-1].id == told


async def test_an_error_has_its_request_id_too(service: FakeService) -> None:
    service.failure = errors.InvalidInputError("no")
    context = Context(**{"x-request-id": "job-7"})
    await infer(service, context)
    assert context.trailing == {"x-request-id": "job-7"}


async def test_a_call_tells_what_it_cost_in_the_words_of_http(service: FakeService, client: httpx.AsyncClient) -> None:
    context = Context()
    await infer(service, context)
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["abc"]}]}
    headers = (await client.post("/v2/models/tiny/infer", json=body)).headers
    told = {name for name in headers if name.startswith("x-") or name == "server-timing"}
    assert set(context.trailing) == told
    for name in ("x-compute-tokens", "x-compute-characters", "x-inference-time", "x-queue-time"):
        assert context.trailing[name] == headers[name]
    for told_by in (context.trailing, headers):
        assert (told_by["x-model-revision"], told_by["x-model-version"]) == (VERSION.revision, VERSION.fingerprint)


@pytest.mark.parametrize("failure", [errors.OverloadedError, errors.QuotaExceededError])
async def test_an_overloaded_call_says_when_to_come_back(service: FakeService, failure: type[Exception]) -> None:
    service.failure = failure("full", retry_after_s=6.2)  # type: ignore[call-arg]
    context = Context()
    await infer(service, context)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.trailing["retry-after"] == "7"
    assert context.trailing["grpc-retry-pushback-ms"] == "7000"


async def test_http_and_grpc_share_the_places(service: FakeService) -> None:
    settings = SettingsRef(IngressSettings(max_concurrent_requests=1))
    door = Door()
    servicer = Servicer(service)
    servicer.open_inference = type(servicer.open_inference)(service, settings, door)
    transport = httpx.ASGITransport(create_app(service, settings, door=door))
    service.go.clear()
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        first = asyncio.ensure_future(servicer.ModelInfer(request_of("a"), Context()))
        await asyncio.wait_for(service.started.wait(), 20)
        assert (await client.post("/embed", json={"inputs": "a"})).status_code == 429
        refused = Context()
        await servicer.ModelInfer(request_of("a"), refused)
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        (streamed,) = [each async for each in servicer.ModelStreamInfer(stream_of(request_of("a")), Context())]
        assert "under way" in streamed.error_message
        service.go.set()
        await first
        assert (await client.post("/embed", json={"inputs": "a"})).status_code == 200


async def test_a_clients_own_deadline_holds(service: FakeService) -> None:
    service.go.clear()
    context = Context(**{"x-request-timeout-ms": "50"})
    await infer(service, context)
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < (service.requests[-1].timeout_s or 0) <= 0.05
    context = Context(**{"x-request-timeout-ms": "soon"})
    await infer(service, context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_clients_priority_is_told(service: FakeService) -> None:
    context = Context(**{"x-priority": "bulk"})
    await infer(service, context)
    assert (context.code, service.requests[-1].priority) == (grpc.StatusCode.OK, "bulk")
    context = Context(**{"x-priority": "high"})
    await infer(service, context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    (tmp_path / "keys").write_text(
        "\n".join((line("alice", "a", "requests_per_minute=1"), line("m", "m", "roles=metrics")))
    )
    return Guard(KeyRing(ApiKeysConfig(file=str(tmp_path / "keys"))))


async def test_keys_roles_and_quotas_hold(service: FakeService, guard: Guard) -> None:
    codes = []
    for key in ("a", "a", "m", "unknown"):
        context = Context(**{"x-api-key": key})
        await infer(service, context, guard)
        codes.append(context.code)
    status = grpc.StatusCode
    assert codes == [status.OK, status.RESOURCE_EXHAUSTED, status.PERMISSION_DENIED, status.UNAUTHENTICATED]
    assert len(service.requests) == 1


async def test_a_call_has_the_same_line_in_the_log(service: FakeService, lines: Lines, guard: Guard) -> None:
    await infer(service, Context(**{"x-request-id": "job-7", "x-api-key": "a"}), guard, log_requests=True)
    (entry,) = lines.entries()
    assert set(entry) == KEYS
    told = {"request_id": "job-7", "method": "gRPC", "route": INFER, "status": 200, "code": "ok", "key": "alice"}
    made = {"model": "tiny", "task": "embedding", "inputs": 1, "tokens": 5, "forward_s": 0.0405}
    assert {**entry, **told, **made} == entry
    assert "abc" not in lines.written[0]


async def test_failed_and_streamed_and_abandoned_calls_are_told_too(lines: Lines) -> None:
    service = FakeService(task="text-generation")
    servicer = Servicer(service, log_requests=True)
    requests = (request_of("a"), request_of("a", name="nonsense"))
    assert len([each async for each in servicer.ModelStreamInfer(stream_of(*requests), Context())]) == 6
    service.go.clear()
    left = asyncio.ensure_future(servicer.ModelInfer(request_of("a"), Context()))
    service.started.clear()
    await asyncio.wait_for(service.started.wait(), 20)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    await servicer.ServerLive(messages.ServerLiveRequest(), Context())
    told = [(entry["status"], entry["code"], entry["tokens"]) for entry in lines.entries()]
    assert told == [(200, "ok", 11), (400, "malformed_request", 0), (499, "cancelled", 0), (200, "ok", 0)]


async def test_what_is_refused_for_want_of_a_place_costs_nothing_of_a_quota(service: FakeService, guard: Guard) -> None:
    servicer = Servicer(service, guard, max_concurrent_requests=1)
    key = {"x-api-key": "a"}
    door, visits = servicer.open_inference._door, servicer.open_inference.visit
    with visits("ModelInfer", {}) as first:
        door.admit(first, None, "inference")
        refused = Context(**key)
        await servicer.ModelInfer(request_of("a"), refused)
    assert "under way" in refused.details
    admitted = Context(**key)
    await servicer.ModelInfer(request_of("a"), admitted)
    assert admitted.code is grpc.StatusCode.OK


@contextlib.asynccontextmanager
async def called(service: FakeService, **settings: float) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a real server of the edge over `service`."""
    server = grpc.aio.server()
    add_to_server(Servicer(service, **settings), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def streamed_on(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(
        INFER.replace("ModelInfer", "ModelStreamInfer"),
        request_serializer=lambda request: request if type(request) is bytes else request.SerializeToString(),
        response_deserializer=messages.ModelStreamInferResponse.FromString,
    )()


async def test_bytes_that_are_no_message_are_refused_in_words_with_an_id(service: FakeService) -> None:
    async with called(service) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(INFER)(b"\xff\xff\xff", metadata=(("x-request-id", "job-7"),))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "open_inference.proto" in (refused.value.details() or "")
        assert dict(refused.value.trailing_metadata() or ())["x-request-id"] == "job-7"
    assert service.requests == []


async def test_bytes_that_are_no_message_do_not_end_a_stream(service: FakeService) -> None:
    async with called(service) as channel:
        stream = streamed_on(channel)
        await stream.write(b"\xff\xff\xff")
        assert "open_inference.proto" in (await stream.read()).error_message
        await stream.write(request_of("a"))
        assert (await stream.read()).infer_response.model_name == "tiny"
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_stream_on_which_nothing_comes_is_ended(service: FakeService) -> None:
    async with called(service, stream_idle_timeout_s=0.05) as channel:
        stream = streamed_on(channel)
        assert await asyncio.wait_for(stream.code(), 20) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no request came" in await stream.details()
        assert dict(await stream.trailing_metadata())["x-request-id"]


async def test_a_stream_without_a_key_is_refused_before_anything_comes_on_it(
    service: FakeService, guard: Guard
) -> None:
    async with called(service, guard=guard) as channel:  # type: ignore[arg-type]
        stream = streamed_on(channel)
        assert await asyncio.wait_for(stream.code(), 20) is grpc.StatusCode.UNAUTHENTICATED
        assert "API key" in await stream.details()
        assert dict(await stream.trailing_metadata())["x-request-id"]


class Unread:
    """A stream of requests that nobody may read."""

    def __aiter__(self) -> Unread:
        return self

    async def __anext__(self) -> Any:
        raise AssertionError("it was read")


@pytest.mark.parametrize(("key", "refused"), [("unknown", "UNAUTHENTICATED"), ("m", "PERMISSION_DENIED")])
async def test_a_stream_that_is_refused_holds_no_place(
    service: FakeService, guard: Guard, lines: Lines, key: str, refused: str
) -> None:
    servicer, context = Servicer(service, guard, log_requests=True), Context(**{"x-api-key": key})
    assert [each async for each in servicer.ModelStreamInfer(Unread(), context)] == []
    assert context.code.name == refused
    assert servicer.open_inference._streams._taken == 0
    assert [entry["code"] for entry in lines.entries()] == [{"unknown": "unauthorized", "m": "forbidden"}[key]]


async def test_questions_about_the_server_have_places_of_their_own(service: FakeService) -> None:
    """So that no number of them keeps requests out, or others who ask."""
    asked, release = asyncio.Event(), asyncio.Event()
    count = 0

    async def held(name: str | None = None) -> None:
        nonlocal count
        count += 1
        if count == MOST_QUESTIONS:
            asked.set()
        await release.wait()

    service.ready = held  # type: ignore[method-assign]
    settings, door = SettingsRef(IngressSettings()), Door()
    servicer = Servicer(service)
    servicer.open_inference = type(servicer.open_inference)(service, settings, door)
    transport = httpx.ASGITransport(create_app(service, settings, door=door))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        http = [asyncio.create_task(client.get("/ready")) for _ in range(MOST_QUESTIONS - 1)]
        ready = asyncio.create_task(servicer.ServerReady(messages.ServerReadyRequest(), Context()))
        await asyncio.wait_for(asked.wait(), 20)
        for path in ("/ready", "/models/tiny/health", "/info", "/metrics", "/v2/health/ready", "/v2/models/tiny"):
            refused = await client.get(path)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1"), path
        context = Context()
        await servicer.ServerReady(messages.ServerReadyRequest(), context)
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.get("/health")).status_code == (await client.get("/docs")).status_code == 200
        assert (await client.post("/embed", json={"inputs": "a"})).status_code == 200
        release.set()
        assert [response.status_code for response in await asyncio.gather(*http)] == [200] * len(http)
        assert (await ready).ready
        assert (await client.get("/ready")).status_code == 200


async def test_streams_are_counted_as_long_as_they_are_open(service: FakeService) -> None:
    async with called(service, max_concurrent_requests=1) as channel:
        first = streamed_on(channel)
        await first.write(request_of("a"))
        await first.read()
        second = streamed_on(channel)
        assert await asyncio.wait_for(second.code(), 20) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(await second.trailing_metadata())["retry-after"] == "1"
        await first.done_writing()
        assert await first.code() is grpc.StatusCode.OK
        third = streamed_on(channel)
        await third.write(request_of("a"))
        assert (await third.read()).infer_response.model_name == "tiny"
        third.cancel()


async def test_a_client_that_leaves_a_stream_gives_its_place_back(service: FakeService) -> None:
    async with called(service, max_concurrent_requests=1) as channel:
        for _ in range(3):
            stream = streamed_on(channel)
            await stream.write(request_of("a"))
            assert (await stream.read()).infer_response.model_name == "tiny"
            stream.cancel()
            await asyncio.sleep(0.05)

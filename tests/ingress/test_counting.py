"""Each request is counted once, when it leaves, however it ended and whatever protocol it came by."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from starlette.types import Message

from serve_app import errors
from serve_app.config import ApiKeysConfig, IngressSettings
from serve_app.ingress.access import Guard
from serve_app.ingress.asgi import create_app
from serve_app.ingress.door import Door
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.protocols.open_inference.grpc import OpenInference, OpenInferenceMethods
from serve_app.ingress.service import SettingsRef
from serve_app.metrics import IngressMetrics
from tests.ingress.edge import FakeService
from tests.ingress.test_keys import line
from tests.ingress.test_protocols_open_inference import Context, request_of, stream_of
from tests.ingress.tiers import Recorder

ALICE = {"x-api-key": "a"}
HURRIED = {**ALICE, "x-request-timeout-ms": "30"}
GOOD = {"inputs": "a"}
STREAMED = {"prompt": "a", "stream": True}


@dataclass
class Call:
    """A request to an ASGI application, whose client may leave, and take nothing of its answer."""

    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=lambda: dict(ALICE))
    reads: bool = True
    left: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    has_sent: bool = False

    def scope(self) -> dict[str, Any]:
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        told = [] if self.body is None else [(b"content-length", b"%d" % len(self.body))]
        names = {"type": "http", "method": "POST", "path": self.path, "query_string": b""}
        return {**names, "headers": [*headers, *told]}

    async def receive(self) -> Message:
        if not self.has_sent and self.body is not None:
            self.has_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.answered.set()
        if not self.reads:
            await asyncio.Event().wait()


class Edge(OpenInferenceMethods):
    """HTTP and gRPC over one service and behind one door, with keys; its metrics remember what they were told."""

    def __init__(self, service: FakeService, keys: Path) -> None:
        lines = [line("alice", "a"), line("m", "m", "roles=metrics"), line("poor", "p", "requests_per_minute=1")]
        keys.write_text("\n".join([*lines, line("spent", "s", "tokens_per_minute=1")]))
        self.service = service
        self.settings = SettingsRef(IngressSettings())
        self.metrics = IngressMetrics(*(Recorder() for _ in range(7)))  # type: ignore[arg-type]
        self.door = Door(Guard(KeyRing(ApiKeysConfig(file=str(keys)))), self.metrics)
        self.app = create_app(service, self.settings, door=self.door)
        self.open_inference = OpenInference(service, self.settings, self.door)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://edge")

    def set(self, **settings: float) -> None:
        self.settings.current = IngressSettings.model_validate(settings)

    async def post(self, path: str = "/embed", body: Any = GOOD, headers: dict[str, str] = ALICE) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    async def call(self, call: Call) -> None:
        await self.app(call.scope(), call.receive, call.send)

    def start(self, call: Call) -> asyncio.Task[None]:
        return asyncio.create_task(self.call(call))

    async def infer(self, request: Any, **metadata: str) -> None:
        await self.ModelInfer(request, Context(**(metadata or {"x-api-key": "a"})))

    async def streamed(self, *requests: Any, **metadata: str) -> None:
        async for _ in self.ModelStreamInfer(stream_of(*requests), Context(**(metadata or {"x-api-key": "a"}))):
            pass

    def counted(self) -> list[tuple[str, str, str]]:
        """(model, task, code) of each request."""
        told = self.metrics.requests
        assert told.values == [1] * len(told.values)  # type: ignore[attr-defined]
        return [(each["model"], each["task"], each["code"]) for each in told.tags]  # type: ignore[attr-defined]

    def total(self, name: str) -> float:
        return sum(getattr(self.metrics, name).values)


@pytest.fixture
def edge(service: FakeService, tmp_path: Path) -> Edge:
    return Edge(service, tmp_path / "keys")


async def ok(edge: Edge) -> None:
    assert (await edge.post()).status_code == 200


async def malformed(edge: Edge) -> None:
    assert (await edge.post(body={})).status_code == 400


async def without_a_key(edge: Edge) -> None:
    assert (await edge.post(headers={})).status_code == 401


async def wrong_role(edge: Edge) -> None:
    assert (await edge.post(headers={"x-api-key": "m"})).status_code == 403


async def no_such_path(edge: Edge) -> None:
    assert (await edge.post("/nonsense/of/a/client")).status_code == 404


async def no_such_model(edge: Edge) -> None:
    assert (await edge.post("/models/of-a-client/embed")).status_code == 404
    assert (await edge.post("/embed", {**GOOD, "model": "of-a-client"})).status_code == 200, "as any name is taken"


async def not_supported(edge: Edge) -> None:
    assert (await edge.post("/v2/models/tiny/generate")).status_code == 404


async def wrong_method(edge: Edge) -> None:
    assert (await edge.client.get("/embed", headers=ALICE)).status_code == 405


async def too_large(edge: Edge) -> None:
    edge.set(max_body_bytes=5)
    assert (await edge.post()).status_code == 413


async def wrong_media(edge: Edge) -> None:
    response = await edge.client.post("/embed", content=b"a", headers={**ALICE, "content-type": "text/plain"})
    assert response.status_code == 415


async def slow_body(edge: Edge) -> None:
    edge.set(body_timeout_s=0.02)
    await edge.call(Call("/embed"))


async def limits(edge: Edge) -> None:
    edge.set(max_text_characters=1)
    assert (await edge.post(body={"inputs": "ab"})).status_code == 422


async def refused_after_it_was_computed(edge: Edge) -> None:
    edge.service.late_failure = errors.BatchTooLargeError("the answer is too large")
    assert (await edge.post()).status_code == 422


async def failed(edge: Edge) -> None:
    for failure in (errors.ModelFailureError("not a number"), ZeroDivisionError(), errors.UnavailableError("gone")):
        edge.service.failure = failure
        assert (await edge.post()).status_code in (424, 500, 503)


async def quotas(edge: Edge) -> None:
    poor, spent = {"x-api-key": "p"}, {"x-api-key": "s"}
    assert [(await edge.post(headers=poor)).status_code for _ in range(2)] == [200, 429]
    assert [(await edge.post(headers=spent)).status_code for _ in range(2)] == [200, 429]


async def no_place(edge: Edge) -> None:
    edge.set(max_concurrent_requests=1)
    edge.service.go.clear()
    held = asyncio.create_task(edge.post())
    await edge.service.started.wait()
    assert (await edge.post()).status_code == 429
    edge.service.go.set()
    await held


async def overloaded(edge: Edge) -> None:
    edge.service.failure = errors.OverloadedError("full")
    assert (await edge.post()).status_code == 429


async def late(edge: Edge) -> None:
    edge.service.go.clear()
    assert (await edge.post(headers=HURRIED)).status_code == 504


async def left(edge: Edge) -> None:
    edge.service.go.clear()
    call = Call("/embed", json.dumps(GOOD).encode())
    answering = edge.start(call)
    await edge.service.started.wait()
    call.left.set()
    await answering


async def cancelled_by_serve(edge: Edge) -> None:
    edge.service.go.clear()
    answering = edge.start(Call("/embed", json.dumps(GOOD).encode()))
    await edge.service.started.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering


async def takes_no_answer(edge: Edge) -> None:
    edge.set(write_timeout_s=0.02)
    await edge.call(Call("/embed", json.dumps(GOOD).encode(), reads=False))


async def left_while_its_refused_body_was_read(edge: Edge) -> None:
    """The refusal has been written; what follows is only for the connection's sake."""
    edge.set(max_body_bytes=5)
    call = Call("/embed", headers={**ALICE, "content-length": "14"})
    answering = edge.start(call)
    await call.answered.wait()
    answering.cancel()
    await asyncio.wait([answering])


async def words(edge: Edge) -> None:
    assert (await edge.post("/tokenize", {"inputs": "abc"})).status_code == 200
    assert (await edge.post("/decode", {"ids": [1, 2]})).status_code == 200


async def operators(edge: Edge) -> None:
    edge.service.unready = "loading"
    for path in ("/health", "/ready", "/info", "/metrics", "/docs", "/openapi.json", "/v2/health/live", "/v2"):
        await edge.client.get(path, headers={"x-api-key": "m" if path == "/metrics" else "a"})
    await edge.client.get("/info")
    await edge.ServerLive(messages.ServerLiveRequest(), Context())
    await edge.ServerReady(messages.ServerReadyRequest(), Context())
    await edge.ModelMetadata(messages.ModelMetadataRequest(name="tiny"), Context(**ALICE))


async def stream_ok(edge: Edge) -> None:
    edge.service.task = "text-generation"
    assert "[DONE]" in (await edge.post("/v1/completions", STREAMED)).text


async def stream_broken_off(edge: Edge) -> None:
    edge.service.task = "text-generation"
    edge.service.failure, edge.service.pieces_before_failure = errors.ModelFailureError("not a number"), 2
    assert (await edge.post("/v1/completions", STREAMED)).status_code == 200


async def stream_late(edge: Edge) -> None:
    edge.service.task = "text-generation"
    edge.service.go.clear()
    assert "deadline_exceeded" in (await edge.post("/v1/completions", STREAMED, HURRIED)).text


async def stream_left(edge: Edge) -> None:
    edge.service.task = "text-generation"
    edge.service.go.clear()
    call = Call("/v1/completions", json.dumps(STREAMED).encode())
    answering = edge.start(call)
    await call.answered.wait()
    call.left.set()
    await answering


async def stream_cancelled_by_serve(edge: Edge) -> None:
    edge.service.task = "text-generation"
    edge.service.go.clear()
    call = Call("/v1/completions", json.dumps(STREAMED).encode())
    answering = edge.start(call)
    await call.answered.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering


async def grpc_calls(edge: Edge) -> None:
    await edge.infer(request_of("a"))
    await edge.infer(request_of("a", name="nonsense"))
    await edge.infer(request_of("a"), **{"x-api-key": "unknown"})
    for _ in range(2):
        await edge.infer(request_of("a"), **{"x-api-key": "p"})
    edge.service.go.clear()
    await edge.infer(request_of("a"), **HURRIED)


async def grpc_left(edge: Edge) -> None:
    edge.service.go.clear()
    calling = asyncio.create_task(edge.infer(request_of("a")))
    await edge.service.started.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


async def grpc_streams(edge: Edge) -> None:
    edge.service.task = "text-generation"
    await edge.streamed(request_of("a"), request_of("a", name="nonsense"))
    await edge.streamed(request_of("a"), **{"x-api-key": "unknown"})
    edge.service.go.clear()
    await edge.streamed(request_of("a"), **HURRIED)


async def grpc_stream_without_a_place(edge: Edge) -> None:
    edge.set(max_concurrent_requests=1)
    edge.open_inference._streams.take(1, "streams are open")
    await edge.streamed(request_of("a"))


async def grpc_stream_left(edge: Edge) -> None:
    edge.service.task = "text-generation"
    edge.service.go.clear()
    responses = edge.ModelStreamInfer(stream_of(request_of("a")), Context(**ALICE))
    await anext(responses)
    await responses.aclose()


Outcomes: TypeAlias = list[tuple[str, str, str]]
TINY, GENERATED, REFUSED = ("tiny", "embedding"), ("tiny", "text-generation"), ("", "")
TABLE: dict[Callable[[Edge], Awaitable[None]], Outcomes] = {
    ok: [(*TINY, "ok")],
    malformed: [(*REFUSED, "malformed_request")],
    without_a_key: [(*REFUSED, "unauthorized")],
    wrong_role: [(*REFUSED, "forbidden")],
    no_such_path: [(*REFUSED, "route_not_found")],
    no_such_model: [(*REFUSED, "model_not_found"), (*TINY, "ok")],
    not_supported: [(*REFUSED, "route_not_found")],
    wrong_method: [(*REFUSED, "method_not_allowed")],
    too_large: [(*REFUSED, "body_too_large")],
    wrong_media: [(*REFUSED, "unsupported_media_type")],
    slow_body: [(*REFUSED, "body_timeout")],
    limits: [(*TINY, "input_too_long")],
    refused_after_it_was_computed: [(*TINY, "batch_too_large")],
    failed: [(*TINY, "model_failure"), (*TINY, "internal"), (*TINY, "unavailable")],
    quotas: [(*TINY, "ok"), (*REFUSED, "quota_exceeded")] * 2,
    no_place: [(*REFUSED, "overloaded"), (*TINY, "ok")],
    overloaded: [(*TINY, "overloaded")],
    late: [(*TINY, "deadline_exceeded")],
    left: [(*TINY, "cancelled")],
    cancelled_by_serve: [(*TINY, "cancelled")],
    takes_no_answer: [(*TINY, "cancelled")],
    left_while_its_refused_body_was_read: [(*REFUSED, "body_too_large")],
    words: [("tiny", "tokenize", "ok"), ("tiny", "decode", "ok")],
    operators: [],
    stream_ok: [(*GENERATED, "ok")],
    stream_broken_off: [(*GENERATED, "model_failure")],
    stream_late: [(*GENERATED, "deadline_exceeded")],
    stream_left: [(*GENERATED, "cancelled")],
    stream_cancelled_by_serve: [(*GENERATED, "cancelled")],
    grpc_calls: [
        (*TINY, "ok"),
        ("tiny", "", "malformed_request"),
        (*REFUSED, "unauthorized"),
        (*TINY, "ok"),
        (*REFUSED, "quota_exceeded"),
        (*TINY, "deadline_exceeded"),
    ],
    grpc_left: [(*TINY, "cancelled")],
    grpc_streams: [
        (*GENERATED, "ok"),
        ("tiny", "", "malformed_request"),
        (*REFUSED, "unauthorized"),
        (*GENERATED, "deadline_exceeded"),
    ],
    grpc_stream_without_a_place: [(*REFUSED, "overloaded")],
    grpc_stream_left: [(*GENERATED, "cancelled")],
}
"""What a person would write down: (model, task, code) of each request, in the order in which they leave."""


@pytest.mark.parametrize("happening", TABLE, ids=lambda happening: happening.__name__)
async def test_a_request_is_counted_once_with_how_it_ended(
    edge: Edge, happening: Callable[[Edge], Awaitable[None]]
) -> None:
    await asyncio.wait_for(happening(edge), 20)
    assert edge.counted() == TABLE[happening]


def test_every_code_that_a_client_can_get_is_in_the_table() -> None:
    """But for those that are of the configuration and of model files."""
    counted = {code for outcomes in TABLE.values() for _, _, code in outcomes}
    of_requests = {cls.code for cls in vars(errors).values() if _is_of_a_request(cls)}
    assert of_requests - counted == {"bad_request", "invalid_input", "empty_input"}, "refusals as malformed ones are"
    assert counted - of_requests == {"ok", "cancelled"}


def _is_of_a_request(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, errors.RequestError | errors.ServerError)


@pytest.mark.parametrize(
    ("happening", "tokens"),
    [
        (ok, 1 + 2),
        (refused_after_it_was_computed, 1 + 2),
        (words, 1 + 3 + 2),
        (stream_ok, 6 + 5),
        (stream_broken_off, 6 + 2),
        (stream_late, 6 + 1),
        (stream_left, 6 + 1),
        (grpc_streams, (6 + 5) + (6 + 1)),
        (malformed, 0),
        (overloaded, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_tokens_are_all_that_were_computed_whatever_was_answered(
    edge: Edge, happening: Callable[[Edge], Awaitable[None]], tokens: int
) -> None:
    """A text of one character has 3 tokens here, a prompt 6, and a whole generated answer 5 (`tests.ingress.edge`)."""
    await asyncio.wait_for(happening(edge), 20)
    assert edge.total("tokens") == tokens


async def test_generated_answers_that_come_whole_have_their_new_tokens_too(edge: Edge) -> None:
    edge.service.task = "text-generation"
    assert (await edge.post("/v1/completions", {"prompt": "a"})).status_code == 200
    assert edge.total("tokens") == (1 + 2) + 4


async def test_cut_inputs_are_counted_with_the_request(edge: Edge) -> None:
    edge.service.long_texts = (2, 0)
    await edge.post()
    assert edge.total("truncated_inputs") == 2

"""The HTTP edge over a service that needs no Ray: real tasks, made-up vectors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import numpy as np
import uvicorn

from serve_app.cache.status import ModelOnNode
from serve_app.config import IngressSettings
from serve_app.errors import ModelNotFoundError, UnavailableError
from serve_app.ingress.asgi import App, create_app
from serve_app.ingress.service import ModelInfo, SettingsRef
from serve_app.tasks.registry import TASKS
from serve_app.types import Answer, Features, FloatArray, ModelCard, ModelState, Request, TextInput, Timings
from tests.batches import NO_TOKENS

CARD = ModelCard(
    name="tiny",
    source="some-org/tiny",
    revision="0" * 40,
    task="embedding",
    model_type="bert",
    max_input_tokens=64,
    hidden_size=16,
    pooling="mean",
    normalize=False,
    long_texts="truncate",
    prompts={"query": "query: "},
)
STATE = ModelState("float32", "cpu", "packed", 1024, {"resident_bytes": 1e8})


def vector(value: TextInput, prompt: str = "") -> FloatArray:
    """The made-up vector of an input, (16,) float32, of no particular length."""
    told = prompt + value if isinstance(value, str) else repr(value)
    rng = np.random.default_rng(zlib.crc32(told.encode("utf-8")))
    return rng.standard_normal(CARD.hidden_size).astype(np.float32) * 3


def unit(values: FloatArray) -> FloatArray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


class FakeService:
    """Answers at once unless held; fails as told; remembers what it was asked and what was cancelled."""

    def __init__(self, *names: str) -> None:
        self.models = names or (CARD.name,)
        self.requests: list[Request] = []
        self.failure: BaseException | None = None
        self.unready: str | None = None
        self.device = "cpu"
        self.state: ModelState | None = STATE
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def card(self, name: str) -> ModelCard:
        if name not in self.models:
            raise ModelNotFoundError("no such model")
        return replace(CARD, name=name)

    async def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise self.failure
        return self._computed(request, await self.card(request.model))

    def _computed(self, request: Request, card: ModelCard) -> Answer:
        task = TASKS[request.task]
        prompt = task.prepare(request, card).prompt
        rows = np.stack([vector(value, prompt) for value in request.inputs])
        timings = Timings(tokenize_s=0.0015, queue_s=0.0025, forward_s=0.0405)
        output = task.postprocess(request, card, Features(NO_TOKENS, rows), None)
        return Answer(output, sum(map(len, request.inputs)) + 2, timings)

    async def ready(self, name: str | None = None) -> None:
        if name is not None:
            await self.card(name)
        if self.unready is not None:
            raise UnavailableError(self.unready)

    async def info(self, name: str) -> ModelInfo:
        return ModelInfo(await self.card(name), self.state)

    def compute_type(self, name: str) -> str:
        return self.device

    async def metrics_text(self) -> bytes:
        return b"# TYPE serve_app_requests_total counter\nserve_app_requests_total 3\n"

    async def memory(self, name: str) -> str:
        await self.card(name)
        return "rss_bytes 1,000\n"

    async def cache(self) -> list[ModelOnNode]:
        return [ModelOnNode("node", "10.0.0.1", "tiny", "0" * 40, "downloading", 50, 100, 10.0, 5.0)]


def edge_app(service: FakeService, **settings: float) -> App:
    return create_app(service, SettingsRef(IngressSettings.model_validate(settings)))


def _server(app: App) -> tuple[uvicorn.Server, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on")), listener


@contextlib.asynccontextmanager
async def served(app: App) -> AsyncIterator[tuple[str, int]]:
    """Host and port of a real HTTP server on the test's own event loop."""
    server, listener = _server(app)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()
    finally:
        server.should_exit = server.force_exit = True
        await serving
        listener.close()


@contextlib.contextmanager
def served_in_thread(app: App) -> Iterator[str]:
    """Base URL of a real HTTP server in a thread, for clients that block."""
    server, listener = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="edge")
    thread.start()
    try:
        host, port = listener.getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def client_of(service: FakeService, **settings: float) -> httpx.AsyncClient:
    """A client that talks to the edge in the same process."""
    transport = httpx.ASGITransport(edge_app(service, **settings))
    return httpx.AsyncClient(transport=transport, base_url="http://edge", timeout=30)

"""The HTTP edge over a service that needs no Ray: real tasks, made-up vectors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace

import httpx
import numpy as np
import uvicorn
from starlette.types import ASGIApp

from serve_app.cache.status import ModelOnNode
from serve_app.config import IngressSettings
from serve_app.errors import ModelNotFoundError, UnavailableError
from serve_app.ingress.asgi import App, create_app
from serve_app.ingress.limits import characters_of
from serve_app.ingress.service import ModelInfo, SettingsRef, TextToken
from serve_app.options import (
    ClassificationOptions,
    FillMaskOptions,
    GenerationOptions,
    QuestionAnsweringOptions,
    RerankOptions,
    SparseEmbeddingOptions,
    TokenClassificationOptions,
    TokenEmbeddingOptions,
    ZeroShotOptions,
)
from serve_app.outputs import (
    Entity,
    Fill,
    Generated,
    GeneratedPiece,
    LabelScore,
    Ranking,
    Span,
    SparseVector,
    TaskOutput,
    TokenLogprob,
)
from serve_app.tasks.inputs import prompt_of
from serve_app.tasks.registry import TASKS
from serve_app.types import (
    Answer,
    Features,
    FloatArray,
    ModelCard,
    ModelState,
    Request,
    TextInput,
    Timings,
    TokenIds,
    Usage,
    Version,
)
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
VERSION = Version("f" * 16, CARD.revision)
STATE = ModelState("float32", "cpu", "packed", 1024, {"resident_bytes": 1e8})


def vector(value: TextInput, prompt: str = "") -> FloatArray:
    """The made-up vector of an input, (16,) float32, of no particular length."""
    told = prompt + value if isinstance(value, str) else repr(value)
    rng = np.random.default_rng(zlib.crc32(told.encode("utf-8")))
    return rng.standard_normal(CARD.hidden_size).astype(np.float32) * 3


def unit(values: FloatArray) -> FloatArray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


TIMINGS = Timings(tokenize_s=0.0015, queue_s=0.0025, forward_s=0.0405)
WORDS = ("Once", " upon", " a", " time")
TOKENS = tuple(TokenLogprob(10 + i, w, -0.5 * i, (TokenLogprob(1, "x", -0.25),)) for i, w in enumerate(WORDS))


def made_up(request: Request) -> TaskOutput:
    """An answer of the right shape for every task but the real ones."""
    options, inputs = request.options, request.inputs
    if isinstance(options, TokenEmbeddingOptions):
        return tuple(np.stack([vector(value)] * 3) for value in inputs)
    if isinstance(options, SparseEmbeddingOptions):
        return tuple(SparseVector(np.array([3, 70], np.int32), np.array([0.5, 1.5], np.float32)) for _ in inputs)
    if isinstance(options, RerankOptions):
        scores = np.arange(len(inputs) - 1, dtype=np.float32) / 8
        return Ranking(scores, tuple(range(len(scores)))[::-1])
    if isinstance(options, ZeroShotOptions):
        return tuple(tuple(LabelScore(label, 0.5) for label in options.labels) for _ in inputs)
    if isinstance(options, ClassificationOptions):
        scores = (LabelScore("POSITIVE", 0.75), LabelScore("NEGATIVE", 0.25))
        return tuple(scores[: options.top_k] for _ in inputs)
    if isinstance(options, TokenClassificationOptions):
        index = 4 if options.aggregation == "none" else None
        return tuple((Entity("PER", 0.9, "sarah", 11, 16, index),) for _ in inputs)
    if isinstance(options, FillMaskOptions):
        fills = (Fill(0.5, 7, "capital", "the capital"), Fill(0.25, 8, "heart", "the heart"))
        return tuple((fills[: options.top_k],) * max(1, str(value).count("[MASK]")) for value in inputs)
    if isinstance(options, QuestionAnsweringOptions):
        return tuple((Span("London", 0.9, 3, 9), Span("Sarah", 0.05, 0, 5))[: options.top_k] for _ in inputs)
    assert isinstance(options, GenerationOptions)
    told = () if options.logprobs is None else TOKENS
    one = Generated("".join(WORDS), (10, 11, 12, 13), "length", told, (0, 4, 9, 11) if told else ())
    return (one,) * (len(inputs) * options.n)


def new_tokens(answer: Answer) -> int:
    """Those that were generated."""
    output = answer.output if isinstance(answer.output, tuple) else ()
    return sum(len(one.tokens) for one in output if isinstance(one, Generated))


def pieces_of(request: Request) -> Iterator[GeneratedPiece]:
    """Of several answers the first pieces of all, then the second ones, and so on."""
    assert isinstance(request.options, GenerationOptions)
    choices = range(request.options.n)
    for index, (word, token) in enumerate(zip(WORDS, TOKENS, strict=True)):
        logprob = None if request.options.logprobs is None else token
        for choice in choices:
            yield GeneratedPiece(word, 10 + index, logprob=logprob, prompt_tokens=6, choice=choice)
    for choice in choices:
        yield GeneratedPiece("", 0, special=True, finish_reason="stop", prompt_tokens=6, choice=choice)


class FakeService:
    """Answers at once unless held; fails as told, before it computes or after; remembers what it was asked and what
    was cancelled.
    """

    def __init__(self, *names: str, task: str = "embedding", tasks: Mapping[str, str] | None = None) -> None:
        self.models = names or (CARD.name,)
        self.task = task
        self.tasks = tasks or {}
        self.aliases: Mapping[str, str] = {}
        self.long_texts = (0, 0)
        self.pieces_before_failure = 0
        self.requests: list[Request] = []
        self.failure: BaseException | None = None
        self.late_failure: BaseException | None = None
        self.unready: str | None = None
        self.starting: set[str] = set()
        self.device = "cpu"
        self.state: ModelState | None = STATE
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def card(self, name: str) -> ModelCard:
        if name not in self.models:
            raise ModelNotFoundError("no such model")
        return replace(CARD, name=name, task=self.tasks.get(name, self.task))

    async def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        self.started.set()
        with request.usage.computing():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if self.failure is not None:
            raise self.failure
        answer = self._computed(request, await self.card(request.model))
        request.usage.tokens += answer.tokens + new_tokens(answer)
        if self.late_failure is not None:
            raise self.late_failure
        return answer

    def _computed(self, request: Request, card: ModelCard) -> Answer:
        if request.task not in ("embedding", "similarity"):
            return self._told(request, made_up(request))
        task = TASKS[request.task]
        prompt = task.prepare(request, card).prompt
        rows = np.stack([vector(value, prompt) for value in request.inputs])
        output = task.postprocess(request, card, Features(NO_TOKENS, rows), None)
        return self._told(request, output)

    def _told(self, request: Request, output: TaskOutput) -> Answer:
        tokens = sum(map(characters_of, request.inputs)) + 2
        return Answer(output, tokens, TIMINGS, *self.long_texts, version=VERSION)

    async def estimate(self, request: Request) -> int:
        return sum(map(characters_of, request.inputs))

    async def stream(self, request: Request) -> AsyncIterator[GeneratedPiece]:
        """A word at a time, each when `go` is set; fails, as told, after `pieces_before_failure`."""
        self.requests.append(request)
        self.started.set()
        try:
            for index, piece in enumerate(pieces_of(request)):
                if self.failure is not None and index == self.pieces_before_failure:
                    raise self.failure
                request.usage.tokens += (piece.token is not None) + (0 if index else piece.prompt_tokens)
                yield piece if index else replace(piece, revision=VERSION.revision)
                await self.go.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def tokenize(
        self, model: str, texts: Sequence[str], special_tokens: bool, prompt_name: str | None, usage: Usage
    ) -> list[list[TextToken]]:
        if self.failure is not None:
            raise self.failure
        prompt = prompt_of(prompt_name, await self.card(model))
        texts = [prompt + text for text in texts]
        start = [TextToken(0, "[CLS]", True, None, None)] if special_tokens else []
        found = [[*start, *(TextToken(ord(c), c, False, i, i + 1) for i, c in enumerate(text))] for text in texts]
        usage.tokens += sum(map(len, found))
        return found

    async def decode(
        self, model: str, sequences: Sequence[TokenIds], skip_special_tokens: bool, usage: Usage
    ) -> list[str]:
        if self.failure is not None:
            raise self.failure
        usage.tokens += sum(map(len, sequences))
        return ["".join(chr(i) if 0 < i < 0xD800 else "?" for i in ids) for ids in sequences]

    async def ready(self, name: str | None = None) -> None:
        if name is not None:
            await self.card(name)
        if self.unready is not None:
            raise UnavailableError(self.unready)

    def has_version(self, name: str) -> bool:
        return name not in self.starting

    async def info(self, name: str) -> ModelInfo:
        return ModelInfo(await self.card(name), self.state, VERSION)

    def compute_type(self, name: str) -> str:
        return self.device

    async def metrics_text(self, everything: bool) -> bytes:
        text = b"# TYPE serve_app_requests_total counter\nserve_app_requests_total 3\n"
        return text + b"# TYPE ray_tasks gauge\nray_tasks 1\n" if everything else text

    async def memory(self, name: str) -> str:
        await self.card(name)
        return "rss_bytes 1,000\n"

    async def cache(self) -> list[ModelOnNode]:
        return [ModelOnNode("node", "10.0.0.1", "tiny", "0" * 40, "downloading", 50, 100, 10.0, 5.0)]


def edge_app(service: FakeService, **settings: float) -> App:
    return create_app(service, SettingsRef(IngressSettings.model_validate(settings)))


def _server(app: ASGIApp) -> tuple[uvicorn.Server, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on")), listener


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[tuple[str, int]]:
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
    thread = threading.Thread(daemon=True, target=server.run, kwargs={"sockets": [listener]}, name="edge")
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

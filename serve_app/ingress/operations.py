"""Health, readiness, information and metrics: what operators and load balancers ask."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field

from serve_app import __version__
from serve_app.errors import MalformedRequestError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Exchange, Reply, while_connected
from serve_app.ingress.inference import choose_model
from serve_app.ingress.protocols.envelope import TEIErrorBody, write_tei_error
from serve_app.ingress.routes import Route
from serve_app.ingress.service import ModelInfo
from serve_app.tasks.generation import GENERATING
from serve_app.types import ModelCard

T = TypeVar("T")

DIALECT = Dialect("Operations", write_tei_error, TEIErrorBody)

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
TEXT = "text/plain; charset=utf-8"


class Health(BaseModel):
    """All is well."""

    status: Literal["ok"]


class EmbeddingFacts(BaseModel):
    """TEI's description of an embedding model; a sparse one's pooling is splade."""

    pooling: str


class EmbeddingType(BaseModel):
    """Of models that embed."""

    embedding: EmbeddingFacts


class LabelFacts(BaseModel):
    """TEI's description of a classifier: its labels by number, and their numbers."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ClassifierType(BaseModel):
    """Of models that classify texts, zero-shot ones among them."""

    classifier: LabelFacts


class RerankerType(BaseModel):
    """Of models that order texts."""

    reranker: LabelFacts


class OtherFacts(BaseModel):
    """Labels where the task has some; whether a model that generates takes conversations."""

    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None
    chat: bool | None = None


OtherType = Annotated[
    dict[str, OtherFacts],
    Field(description="Of tasks that TEI does not have: what is known, under the task's name.", max_length=1),
]


class ModelFacts(BaseModel):
    """One model: TEI's fields, and ours; null where it is not known yet or has no meaning here."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(description="Where the model's files come from.")
    model_sha: str = Field(description="Revision of the files.")
    model_version: str | None = Field(
        description="Fingerprint of the version that answers now: of its files, its configuration and the software."
    )
    model_dtype: str | None = Field(description="Type of the weights; null until a replica of the model has answered.")
    model_type: EmbeddingType | ClassifierType | RerankerType | OtherType
    served_model_name: str
    max_input_length: int = Field(description="Tokens of one sequence, special tokens included.")
    max_batch_tokens: int | None = Field(description="Most tokens in one forward pass.")
    auto_truncate: bool = Field(description="Whether inputs that are too long are cut where a request does not say.")
    task: str
    architecture: str
    hidden_size: int
    normalize: bool
    prompts: list[str] = Field(description="Names that `prompt_name` takes.")
    default_prompt_name: str | None
    device: str | None
    attention: str | None = Field(description='"packed", or "bucketed" with the reason.')
    memory: dict[str, float] = Field(description="What a replica says of its memory, by name.")


class Info(BaseModel):
    """The server and its models."""

    version: str
    max_client_batch_size: int
    max_concurrent_requests: int = Field(description="Requests with a body that one ingress replica has at a time.")
    tokenization_workers: int = Field(
        description="Calls that are tokenized at once by one tokenizer replica of each model, all models together."
    )
    models: list[ModelFacts]
    starting: list[str] = Field(description="Names of further models, of which no version answers yet.")


class OneModelInfo(Info, ModelFacts):
    """The server and its only model, whose fields are also at the top, as in TEI."""


class CachedModel(BaseModel):
    """One model on one node. Sizes in bytes, times in seconds."""

    node_id: str
    address: str
    model: str
    revision: str
    phase: Literal["pending", "downloading", "verifying", "ready", "error"]
    bytes_done: int
    bytes_total: int
    bytes_per_s: float
    seconds_left: float | None
    error: str | None = Field(description="Why, where the phase is error.")


class CacheStatus(BaseModel):
    """Where every model's files are."""

    nodes: list[CachedModel]


async def health(exchange: Exchange) -> Reply:
    """The process lives; of one model, that it answers."""
    if exchange.path_model is not None:
        await _asked(exchange, exchange.service.ready(choose_model(exchange, None)))
    return Reply(encode({"status": "ok"}))


async def ready(exchange: Exchange) -> Reply:
    await _asked(exchange, exchange.service.ready(None))
    return Reply(encode({"status": "ok"}))


async def info(exchange: Exchange) -> Reply:
    return Reply(encode(await _asked(exchange, _info(exchange))))


async def metrics(exchange: Exchange) -> Reply:
    text = await _asked(exchange, exchange.service.metrics_text(_wants_all(exchange)))
    return Reply(text, content_type=PROMETHEUS.encode())


def _wants_all(exchange: Exchange) -> bool:
    """Raises MalformedRequestError."""
    query: bytes = exchange.scope["query_string"]
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("all", ["0"])[-1]
    if given not in ("0", "1"):
        raise MalformedRequestError("the query parameter `all` takes 0 or 1")
    return given == "1"


async def memory(exchange: Exchange) -> Reply:
    text = await _asked(exchange, exchange.service.memory(choose_model(exchange, None)))
    return Reply(text.encode(), content_type=TEXT.encode())


async def cache(exchange: Exchange) -> Reply:
    nodes = await _asked(exchange, exchange.service.cache())
    return Reply(encode({"nodes": [asdict(node) for node in nodes]}))


async def _asked(exchange: Exchange, question: Coroutine[Any, Any, T]) -> T:
    return await while_connected(exchange.receive, question, exchange.time_left_s)


async def _info(exchange: Exchange) -> Mapping[str, Any]:
    names = exchange.service.models if exchange.path_model is None else (choose_model(exchange, None),)
    starting = [name for name in names if not exchange.service.has_version(name)] if len(names) > 1 else []
    names = [name for name in names if name not in starting]
    found = [await exchange.service.info(name) for name in names]
    models = [model_facts(model) for model in found]
    server = {
        "version": __version__,
        "max_client_batch_size": exchange.settings.max_client_batch_size,
        "max_concurrent_requests": exchange.settings.max_concurrent_requests,
        "tokenization_workers": sum(model.card.tokenizer_threads for model in found),
        "models": models,
        "starting": starting,
    }
    return {**models[0], **server} if len(models) == 1 and not starting else server


def model_facts(model: ModelInfo) -> Mapping[str, Any]:
    card, state = model.card, model.state
    return {
        "model_id": card.source,
        "model_sha": card.revision,
        "model_version": model.version and model.version.fingerprint,
        "model_dtype": state and state.dtype,
        "model_type": model_type(card),
        "served_model_name": card.name,
        "max_input_length": card.max_input_tokens,
        "max_batch_tokens": state and state.max_batch_tokens,
        "auto_truncate": card.long_texts != "error",
        "task": card.task,
        "architecture": card.model_type,
        "hidden_size": card.hidden_size,
        "normalize": card.normalize,
        "prompts": sorted(card.prompts),
        "default_prompt_name": card.default_prompt_name,
        "device": state and state.device,
        "attention": state and state.attention,
        "memory": dict(state.memory) if state else {},
    }


_TEI_TYPES = {
    "text-classification": "classifier",
    "zero-shot-classification": "classifier",
    "rerank": "reranker",
}


def model_type(card: ModelCard) -> Mapping[str, Any]:
    """In TEI's shape for the tasks that TEI has, for others what is known under the task's name."""
    if card.task == "embedding":
        return {"embedding": {"pooling": card.pooling}}
    if card.task == "sparse-embedding":
        return {"embedding": {"pooling": "splade"}}
    facts: dict[str, Any] = {}
    if card.labels:
        facts["id2label"] = {str(index): label for index, label in enumerate(card.labels)}
        facts["label2id"] = {label: index for index, label in enumerate(card.labels)}
    elif card.task in GENERATING:
        facts["chat"] = card.can_chat
    return {_TEI_TYPES.get(card.task, card.task): facts}


def routes() -> tuple[Route, ...]:
    asks = (503, 504)
    asks_one = (404, *asks)
    return (
        Route("GET", "/health", health, DIALECT, "Whether the server lives", answer=Health, role=None),
        Route("GET", "/ping", health, DIALECT, "The same, as TEI has it too", answer=Health, role=None),
        Route("GET", "/ready", ready, DIALECT, "Whether every model answers", answer=Health, failures=asks, role=None),
        Route("GET", "/info", info, DIALECT, "The models", answer=OneModelInfo | Info, failures=asks),
        Route(
            "GET",
            "/metrics",
            metrics,
            DIALECT,
            "Prometheus metrics",
            media=PROMETHEUS,
            failures=(400, *asks),
            description="Those of this application and of Ray Serve; with `?all=1` also all others that Ray has.",
            role="metrics",
        ),
        Route(
            "GET",
            "/models/{name}/health",
            health,
            DIALECT,
            "Whether the model answers",
            answer=Health,
            failures=asks_one,
            role=None,
        ),
        Route("GET", "/models/{name}/info", info, DIALECT, "One model", answer=OneModelInfo, failures=asks_one),
        Route(
            "GET",
            "/models/{name}/memory",
            memory,
            DIALECT,
            "What a replica's allocator says of its memory",
            media=TEXT,
            failures=asks_one,
            role="admin",
        ),
        Route(
            "GET",
            "/admin/cache",
            cache,
            DIALECT,
            "Where every model's files are: pending, downloading, verifying, ready, error",
            answer=CacheStatus,
            failures=asks,
            role="admin",
        ),
    )

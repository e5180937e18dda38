"""Requests as bytes on the wire, made before the clock starts, and the vectors in an answer's body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import numpy as np
import orjson

from serve_app.cli.bench.corpus import Corpus
from serve_app.cli.bench.loads import LOADS
from serve_app.errors import ConfigError
from serve_app.types import FloatArray

EMBEDDING = "embedding"

ProtocolName: TypeAlias = Literal["tei", "openai", "hf"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """Where texts are sent, in what shape, and where the vectors stand in the answer."""

    path: str
    body: Callable[[Sequence[str], str], Mapping[str, Any]]
    vectors: Callable[[Any], Any]


PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    "tei": Protocol("/embed", lambda texts, model: {"inputs": texts, "truncate": True}, lambda answer: answer),
    "openai": Protocol(
        "/v1/embeddings",
        lambda texts, model: {"input": texts, "model": model},
        lambda answer: [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])],
    ),
    "hf": Protocol("/models/{model}", lambda texts, model: {"inputs": texts}, lambda answer: answer),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address; `path` overrides the protocol's own. Beside embedding, each task has one shape."""

    host: str
    port: int
    protocol: ProtocolName = "tei"
    model: str = "default"
    path: str | None = None
    task: str = EMBEDDING
    mask: str = ""
    """The model's mask token, for task fill-mask."""

    @property
    def route(self) -> str:
        own = PROTOCOLS[self.protocol].path if self.task == EMBEDDING else LOADS[self.task].path
        return self.path or own.format(model=self.model)

    def body(self, texts: Sequence[str]) -> Mapping[str, Any]:
        if self.task == EMBEDDING:
            return PROTOCOLS[self.protocol].body(texts, self.model)
        return LOADS[self.task].body(texts, self.mask)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, ready to be written to a socket: `texts` from `first` on, which compute `tokens`."""

    payload: bytes
    first: int
    texts: int
    tokens: int


def target_of(url: str, protocol: ProtocolName, model: str, task: str = EMBEDDING, mask: str = "") -> Target:
    """Raises ConfigError for what is no plain http URL. A path in the URL is used as it is."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"--url: {url!r} is not of the form http://host:port; TLS ends before the server")
    path = parts.path.rstrip("/") or None
    return Target(parts.hostname, parts.port or 80, protocol, model, path, task, mask)


def prepare(corpus: Corpus, computed_tokens: Sequence[int], texts_per_request: int, target: Target) -> list[Prepared]:
    """The corpus in requests of so many texts; what is left over at its end is not sent."""
    firsts = range(0, len(corpus.texts) - texts_per_request + 1, texts_per_request)
    if not firsts:
        raise ConfigError(f"--texts: {len(corpus.texts)} texts do not fill one request of {texts_per_request}")
    return [
        Prepared(
            payload=_payload(target, corpus.texts[first : first + texts_per_request]),
            first=first,
            texts=texts_per_request,
            tokens=sum(computed_tokens[first : first + texts_per_request]),
        )
        for first in firsts
    ]


def _payload(target: Target, texts: Sequence[str]) -> bytes:
    body = orjson.dumps(target.body(texts))
    head = (
        f"POST {target.route} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nContent-Type: application/json\r\n"
        f"Accept: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def read_vectors(body: bytes, protocol: ProtocolName) -> FloatArray:
    """The vectors (n, d) in an answer. Raises ValueError if it has another shape."""
    try:
        values = np.asarray(PROTOCOLS[protocol].vectors(orjson.loads(body)), np.float32)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an answer of protocol {protocol}: {body[:80]!r}") from error
    if values.ndim != 2:
        raise ValueError(f"an answer of shape {values.shape}, not (texts, dimensions)")
    return values


def count_answers(body: bytes) -> int:
    """Elements of an answer that is a list. Raises ValueError if it is none."""
    answers = orjson.loads(body)
    if not isinstance(answers, list):
        raise ValueError(f"not a list of answers: {body[:80]!r}")
    return len(answers)

"""The way of every request that is computed: body → Request → Answer → reply."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

from serve_app.errors import MalformedRequestError, ModelNotFoundError, UnavailableError
from serve_app.ingress.asked import TIMEOUT
from serve_app.ingress.body import parse_body, read_body
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.exchange import Exchange, Header, Reply, while_connected
from serve_app.ingress.limits import check_limits, check_stream
from serve_app.ingress.protocols.fields import InferenceBody
from serve_app.ingress.service import served_name
from serve_app.ingress.streaming import Events, stream_reply
from serve_app.ingress.visit import Visit
from serve_app.outputs import GeneratedPiece
from serve_app.types import Answer, Request, Version

BodyT = TypeVar("BodyT", bound=InferenceBody)
Wait: TypeAlias = Callable[[Coroutine[Any, Any, Answer], float], Coroutine[Any, Any, Answer]]


@dataclass(frozen=True, slots=True)
class Inference(Generic[BodyT]):
    """An endpoint: how one protocol's body becomes a Request, and an Answer its reply."""

    body: type[BodyT]
    write: Callable[[BodyT, Request, Answer], bytes]

    async def __call__(self, exchange: Exchange) -> Reply:
        body = parse_body(self.body, await read_body(exchange), exchange.settings)
        request = body.to_request(exchange.id, choose_model(exchange, body.model))
        return await answer(exchange, body, request, self.write)


@dataclass(frozen=True, slots=True)
class Streaming(Generic[BodyT]):
    """An endpoint whose answer comes whole or, where the body asks for it, in pieces."""

    body: type[BodyT]
    write: Callable[[BodyT, Request, Answer], bytes]
    write_stream: Callable[[BodyT, Request, AsyncIterator[GeneratedPiece]], Events]
    dialect: Dialect

    async def __call__(self, exchange: Exchange) -> Reply:
        body = parse_body(self.body, await read_body(exchange), exchange.settings)
        request = body.to_request(exchange.id, choose_model(exchange, body.model))
        if body.streams:
            return await stream(exchange, body, request, self.write_stream, self.dialect)
        return await answer(exchange, body, request, self.write)


async def answer(
    exchange: Exchange, body: BodyT, request: Request, write: Callable[[BodyT, Request, Answer], bytes]
) -> Reply:
    """Compute the request and write its whole answer. Raises ServeAppError or ClientDisconnectedError."""
    computed, headers = await compute(exchange, request)
    return Reply(write(body, request, computed), headers=headers)


async def compute(exchange: Exchange, request: Request) -> tuple[Answer, tuple[Header, ...]]:
    """The request's answer, and the headers that say what it cost. Raises as `answer` does."""
    return await measured(exchange, request, functools.partial(while_connected, exchange.receive))


async def measured(visit: Visit, request: Request, wait: Wait) -> tuple[Answer, tuple[Header, ...]]:
    """As `compute`, for any protocol; `wait` takes the work and the seconds that it may take."""
    attach(visit, request)
    characters = check_limits(request, visit.settings)
    await reserve(visit, request)
    timeout_s = visit.time_left_s
    visit.answer = computed = await wait(visit.service.answer(as_asked(visit, request)), timeout_s)
    compute_type = visit.service.compute_type(request.model)
    total_s = time.perf_counter() - visit.started
    return computed, cost_headers(compute_type, characters, computed, total_s)


async def stream(
    exchange: Exchange,
    body: BodyT,
    request: Request,
    write: Callable[[BodyT, Request, AsyncIterator[GeneratedPiece]], Events],
    dialect: Dialect,
) -> Reply:
    """Compute the request and send its answer in pieces. Raises as `answer` does, before the first piece."""
    attach(exchange, request)
    characters = check_stream(request, exchange.settings)
    compute_type = exchange.service.compute_type(request.model)
    headers = ((b"x-compute-type", compute_type.encode()), (b"x-compute-characters", b"%d" % characters))
    await reserve(exchange, request)
    timed = as_asked(exchange, request)
    return await stream_reply(exchange, timed, dialect, lambda pieces: write(body, request, pieces), headers)


def attach(visit: Visit, request: Request) -> None:
    """The visit is about `request` from now on, and costs what that costs."""
    visit.request, visit.usage = request, request.usage
    visit.model, visit.task = request.model, request.task


async def reserve(visit: Visit, request: Request) -> None:
    """Charge the request to its API key before it is computed, so that leaving early is no way around a quota.

    Raises QuotaExceededError, and what the service raises of requests that it does not take.
    """
    if visit.account is not None and visit.account.tokens is not None:
        visit.reserve(await visit.service.estimate(request))


def as_asked(visit: Visit, request: Request) -> Request:
    """`request` with its priority, and told how much time the client has left for it, where the client asked."""
    timeout_s = visit.time_left_s if TIMEOUT in visit.headers else request.timeout_s
    if timeout_s == request.timeout_s and visit.priority == request.priority:
        return request
    return replace(request, timeout_s=timeout_s, priority=visit.priority)


def choose_model(exchange: Exchange, asked: str | None) -> str:
    """The model that the path names, or the body, or the only one, under the name it is served under.

    Raises ModelNotFoundError if it is not served or the path and the body differ, MalformedRequestError if nothing
    names one of several.
    """
    exchange.model = _chosen_model(exchange, asked)
    return exchange.model


def _chosen_model(exchange: Exchange, asked: str | None) -> str:
    in_path = None if exchange.path_model is None else served_name(exchange.path_model, exchange.service)
    in_body = None if asked is None else _named_in_body(exchange, asked)
    chosen = in_path or in_body
    if chosen is None:
        return _only_model(exchange.service.models)
    if in_body not in (None, chosen):
        raise ModelNotFoundError(
            f"this path is of model {chosen}, and `model` in the body names another; make them agree"
        )
    return chosen


def _named_in_body(exchange: Exchange, asked: str) -> str:
    """Raises ModelNotFoundError."""
    service = exchange.service
    if len(service.models) == 1 and exchange.settings.any_model_name:
        return service.models[0]
    return served_name(asked, service)


def _only_model(models: Sequence[str]) -> str:
    """Raises MalformedRequestError, or UnavailableError while there is no model."""
    if len(models) == 1:
        return models[0]
    if not models:
        raise UnavailableError("no model is deployed yet", retry_after_s=1.0)
    raise MalformedRequestError(
        f"several models are served: {', '.join(models)}. Name one in `model`, or post to /models/<name>/…"
    )


def cost_headers(compute_type: str, characters: int, answer: Answer, total_s: float) -> tuple[Header, ...]:
    """TEI's headers, times in whole milliseconds as there, and the same times with decimals in `server-timing`.

    And what became of inputs that were too long.
    """
    timings = answer.timings
    total, tokenize = total_s * 1e3, timings.tokenize_s * 1e3
    queue, forward = timings.queue_s * 1e3, timings.forward_s * 1e3
    timing = f"total;dur={total:.2f}, tokenize;dur={tokenize:.2f}, queue;dur={queue:.2f}, forward;dur={forward:.2f}"
    return (
        (b"x-compute-type", compute_type.encode()),
        (b"x-compute-time", b"%d" % total),
        (b"x-compute-characters", b"%d" % characters),
        (b"x-compute-tokens", b"%d" % answer.tokens),
        (b"x-total-time", b"%d" % total),
        (b"x-tokenization-time", b"%d" % tokenize),
        (b"x-queue-time", b"%d" % queue),
        (b"x-inference-time", b"%d" % forward),
        (b"x-truncated-inputs", b"%d" % answer.truncated),
        (b"x-windows", b"%d" % answer.windows),
        (b"server-timing", timing.encode()),
        *version_headers(answer.version),
    )


def version_headers(version: Version | None) -> tuple[Header, ...]:
    """Which version of the model made the answer: the revision of its files, and the fingerprint of the whole."""
    if version is None:
        return ()
    return ((b"x-model-revision", version.revision.encode()), (b"x-model-version", version.fingerprint.encode()))

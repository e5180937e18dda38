"""The way of every request that is computed: body → Request → Answer → reply."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

from serve_app.errors import InvalidInputError, MalformedRequestError, ModelNotFoundError, UnavailableError
from serve_app.ingress.asked import TIMEOUT
from serve_app.ingress.body import parse_body, read_body
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.exchange import Exchange, Header, Reply, while_connected
from serve_app.ingress.limits import check_limits, check_stream
from serve_app.ingress.protocols.fields import InferenceBody
from serve_app.ingress.service import Service, served_name
from serve_app.ingress.streaming import Events, stream_reply
from serve_app.ingress.visit import Visit
from serve_app.outputs import GeneratedPiece
from serve_app.tasks.registry import ANSWERED_BY
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
        return await answer(exchange, body, await addressed(exchange, body), self.write)


@dataclass(frozen=True, slots=True)
class Streaming(Generic[BodyT]):
    """An endpoint whose answer comes whole or, where the body asks for it, in pieces."""

    body: type[BodyT]
    write: Callable[[BodyT, Request, Answer], bytes]
    write_stream: Callable[[BodyT, Request, AsyncIterator[GeneratedPiece]], Events]
    dialect: Dialect

    async def __call__(self, exchange: Exchange) -> Reply:
        body = parse_body(self.body, await read_body(exchange), exchange.settings)
        request = await addressed(exchange, body)
        if body.streams:
            return await stream(exchange, body, request, self.write_stream, self.dialect)
        return await answer(exchange, body, request, self.write)


async def addressed(exchange: Exchange, body: InferenceBody) -> Request:
    """`body` as a request to the model that the path names, or the body, or that alone answers its task.

    Raises what `choose_model` and `_model_for` raise, what the body raises, and ClientDisconnectedError.
    """
    model, models = _named_model(exchange, body.model), exchange.service.models
    if model is None and len(models) > 1:
        request = body.to_request(exchange.id, "")
        chosen = _model_for(request.task, exchange.service)
        exchange.model = await while_connected(exchange.receive, chosen, exchange.time_left_s)
        return replace(request, model=exchange.model)
    exchange.model = model or _only_model(models)
    return body.to_request(exchange.id, exchange.model)


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

    Raises ModelNotFoundError if it is not served or the path and the body name two that are, MalformedRequestError if
    nothing names one of several.
    """
    exchange.model = _named_model(exchange, asked) or _only_model(exchange.service.models)
    return exchange.model


def _named_model(exchange: Exchange, asked: str | None) -> str | None:
    """The model that the path names, or `asked`, which is the body's; None where neither names one.

    Raises ModelNotFoundError.
    """
    service = exchange.service
    in_path = None if exchange.path_model is None else served_name(exchange.path_model, service)
    if asked is None:
        return in_path
    is_plain = in_path is not None or len(service.models) == 1
    if is_plain and exchange.settings.any_model_name and service.aliases.get(asked, asked) not in service.models:
        return in_path or service.models[0]
    in_body = served_name(asked, service)
    if in_path not in (None, in_body):
        raise ModelNotFoundError(
            f"this path is of model {in_path}, and `model` in the body names another that is served; make them agree"
        )
    return in_body


def _only_model(models: Sequence[str]) -> str:
    """Raises MalformedRequestError, or UnavailableError while there is no model."""
    if len(models) == 1:
        return models[0]
    if not models:
        raise UnavailableError("no model is deployed yet", retry_after_s=1.0)
    raise _unnamed("several models are served", models)


async def _model_for(task: str, service: Service) -> str:
    """The only one of several models that is served for `task`, or else the only one that answers it.

    Raises MalformedRequestError if several do, InvalidInputError if none does, UnavailableError while one of those
    that have not started yet may be it.
    """
    started = [name for name in service.models if service.has_version(name)]
    tasks = {name: (await service.card(name)).task for name in started}
    able = [name for name in started if tasks[name] == task]
    able = able or [name for name in started if task in ANSWERED_BY[tasks[name]]]
    if len(able) == 1:
        return able[0]
    if able:
        raise _unnamed("several models answer this", able)
    if len(started) < len(service.models):
        raise UnavailableError("no model that has started answers this, and not all have", retry_after_s=1.0)
    told = ", ".join(f"{name} ({tasks[name]})" for name in started)
    raise InvalidInputError(f"this asks for {task}, and no model here answers that; there is: {told}")


def _unnamed(why: str, models: Sequence[str]) -> MalformedRequestError:
    return MalformedRequestError(f"{why}: {', '.join(models)}. Name one in `model`, or post to /models/<name>/…")


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

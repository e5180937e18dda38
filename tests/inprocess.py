"""The whole application on a real socket in this process: its own ingress and replicas, and only Ray left out.

A deployment handle is replaced by one that calls its only replica; what crosses it is pickled, as between processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import pickle
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import ray.serve.context
import uvicorn
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import CacheConfig, IngressConfig, IngressSettings, ModelConfig, ModelSettings
from serve_app.ingress.deployment import Ingress
from serve_app.ingress.front import Front
from serve_app.ingress.served_model import ModelTiers
from serve_app.ingress.tier import Tier, TierView
from serve_app.model.deployment import ModelReplica
from serve_app.tokenizer.deployment import TokenizerReplica
from serve_app.types import Version

T = TypeVar("T")


class Handle:
    """What an ingress knows of a deployment."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._replica, name))


class Method:
    """A method of the replica."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Any:
        answer = self._method(*crossed(arguments))
        return Response(answer) if inspect.isasyncgen(answer) else asyncio.ensure_future(_received(answer))


class Response:
    """An answer in pieces."""

    def __init__(self, pieces: AsyncGenerator[Any, None]) -> None:
        self._pieces = pieces
        self._next: asyncio.Future[Any] | None = None
        self._closing: asyncio.Future[None] | None = None

    async def __anext__(self) -> Any:
        self._next = asyncio.ensure_future(_step(self._pieces))
        return crossed(await self._next)

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        """A generator can be closed only when none of its steps is under way."""
        if self._next is not None and not self._next.done():
            self._next.cancel()
            await asyncio.wait((self._next,))
        await self._pieces.aclose()


async def _step(pieces: AsyncGenerator[Any, None]) -> Any:
    return await anext(pieces)


async def _received(answer: Any) -> Any:
    return crossed(await answer)


def crossed(value: T) -> T:
    copy: T = pickle.loads(pickle.dumps(value))
    return copy


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process, and the event loop that all its tiers share."""

    base_url: str
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def served(models: Sequence[ModelConfig], root: Path, **settings: Any) -> Iterator[str]:
    """Base URL of a server of `models`, as `running` starts it."""
    with running(models, root, **settings) as application:
        yield application.base_url


@contextlib.contextmanager
def running(models: Sequence[ModelConfig], root: Path, **settings: Any) -> Iterator[Running]:
    """A server of `models`, whose cache is `root`; `settings` are the ingress's.

    The environment, in which replicas write, is put back at the end.
    """
    cache = CacheConfig(root=str(root), directory_mode="direct")
    started: Future[tuple[uvicorn.Server, asyncio.AbstractEventLoop]] = Future()
    listener = _listening()
    work = _run(models, cache, IngressSettings.model_validate(settings), listener, started)
    thread = threading.Thread(daemon=True, target=asyncio.run, args=(work,), name="application")
    with mock.patch.dict(os.environ), in_a_replica(), contextlib.closing(listener):
        thread.start()
        server, loop = started.result(timeout=120)
        try:
            host, port = listener.getsockname()
            yield Running(f"http://{host}:{port}", loop)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def in_a_replica() -> Iterator[None]:
    """`@serve.batch` asks the replica that it runs in how many requests may be under way."""
    with mock.patch.object(ray.serve.context, "_INTERNAL_REPLICA_CONTEXT"):
        ray.serve.context._set_internal_replica_context(
            replica_id=ReplicaID("test", DeploymentID("ingress", "serve_app")),
            servable_object=None,
            _deployment_config=DeploymentConfig(max_ongoing_requests=10**10),
            rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
            world_size=1,
        )
        yield


def _listening() -> socket.socket:
    """Asyncio turns Nagle's algorithm off, which would cost each answer 40 ms, only on sockets that name TCP."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    return listener


async def _run(
    models: Sequence[ModelConfig],
    cache: CacheConfig,
    settings: IngressSettings,
    listener: socket.socket,
    started: Future[tuple[uvicorn.Server, asyncio.AbstractEventLoop]],
) -> None:
    replicas: list[Any] = []
    try:
        served = {model.name: (model, await _tiers(model, cache, replicas)) for model in models}
        ingress = Ingress(IngressConfig(cache=cache), Listed(served))
        ingress.reconfigure(settings.model_dump())
        await ingress.look()
        app = Front(TellsRequestId(ingress.__serve_build_asgi_app__()))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        started.set_result((server, asyncio.get_running_loop()))
        await server.serve(sockets=[listener])
    except BaseException as error:
        if not started.done():
            started.set_exception(error)
        raise
    finally:
        for replica in replicas:
            replica.__del__()  # which is what Serve calls when a replica ends


class Listed:
    """A directory of models that do not change."""

    def __init__(self, served: Mapping[str, tuple[ModelConfig, ModelTiers]]) -> None:
        self._served = served

    async def models(self) -> Mapping[str, ModelConfig]:
        return {name: model for name, (model, _) in self._served.items()}

    def tiers(self, application: str, model: str) -> ModelTiers:
        return self._served[application][1]


class TellsRequestId:
    """As Ray Serve's HTTP server does, which writes the header on every response itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                (request_id,) = [value for name, value in scope["headers"] if name == b"x-request-id"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        await self._app(scope, receive, told if scope["type"] == "http" else send)


async def _tiers(model: ModelConfig, cache: CacheConfig, replicas: list[Any]) -> ModelTiers:
    tokenizer = await _replica(TokenizerReplica, model, cache)
    tier = await _replica(ModelReplica, model, cache)
    tier.reconfigure(ModelSettings().model_dump())
    replicas.append(tier)
    return ModelTiers(tier_of(tokenizer), tier_of(tier))


def tier_of(replica: Any) -> Tier:
    """A tier of which `replica` is the only one."""
    view = TierView()
    view.update({ReplicaID("test", DeploymentID("tier", "model")): Version(**replica.record_replica_metadata())})
    return Tier(Handle(replica), view)


async def _replica(cls: Any, model: ModelConfig, cache: CacheConfig) -> Any:
    replica = cls.__new__(cls)
    await replica.__init__(model, cache)
    return replica

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
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import ray.serve.context
import uvicorn
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank

from serve_app.app import generates
from serve_app.config import AppConfig, CacheConfig, IngressSettings, ModelConfig, ModelSettings
from serve_app.ingress.deployment import Ingress, ModelHandles
from serve_app.model.deployment import ModelReplica
from serve_app.model.generation_deployment import GenerationReplica
from serve_app.tokenizer.deployment import TokenizerReplica

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
        return Response(answer) if inspect.isasyncgen(answer) else _received(answer)


class Response:
    """An answer in pieces."""

    def __init__(self, pieces: AsyncGenerator[Any, None]) -> None:
        self._pieces = pieces
        self._closing: asyncio.Future[None] | None = None

    async def __anext__(self) -> Any:
        return crossed(await self._pieces.__anext__())

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._pieces.aclose())


async def _received(answer: Any) -> Any:
    return crossed(await answer)


def crossed(value: T) -> T:
    copy: T = pickle.loads(pickle.dumps(value))
    return copy


@contextlib.contextmanager
def served(models: Sequence[ModelConfig], root: Path, **settings: Any) -> Iterator[str]:
    """Base URL of a server of `models`, whose cache is `root`; `settings` are the ingress's.

    The environment, in which replicas write, is put back at the end.
    """
    config = AppConfig(models=tuple(models), cache=CacheConfig(root=str(root), directory_mode="direct"))
    started: Future[uvicorn.Server] = Future()
    listener = socket.create_server(("127.0.0.1", 0))
    work = _run(config, IngressSettings.model_validate(settings), listener, started)
    thread = threading.Thread(target=asyncio.run, args=(work,), name="application")
    with mock.patch.dict(os.environ), in_a_replica(), contextlib.closing(listener):
        thread.start()
        server = started.result(timeout=120)
        try:
            host, port = listener.getsockname()
            yield f"http://{host}:{port}"
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


async def _run(
    config: AppConfig, settings: IngressSettings, listener: socket.socket, started: Future[uvicorn.Server]
) -> None:
    replicas: list[Any] = []
    try:
        handles = {model.name: await _tiers(model, config.cache, replicas) for model in config.models}
        ingress = Ingress(config, handles)
        ingress.reconfigure(settings.model_dump())
        app = ingress.__serve_build_asgi_app__()
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        started.set_result(server)
        await server.serve(sockets=[listener])
    except BaseException as error:
        if not started.done():
            started.set_exception(error)
        raise
    finally:
        for replica in replicas:
            replica.__del__()  # which is what Serve calls when a replica ends


async def _tiers(model: ModelConfig, cache: CacheConfig, replicas: list[Any]) -> ModelHandles:
    tokenizer = await _replica(TokenizerReplica, model, cache)
    tier = await _replica(GenerationReplica if generates(model) else ModelReplica, model, cache)
    tier.reconfigure(ModelSettings().model_dump())
    replicas.append(tier)
    return ModelHandles(Handle(tokenizer), Handle(tier))


async def _replica(cls: Any, model: ModelConfig, cache: CacheConfig) -> Any:
    replica = cls.__new__(cls)
    await replica.__init__(model, cache)
    return replica

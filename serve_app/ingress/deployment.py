"""The `ingress` deployment: HTTP and gRPC in, answers out, nothing computed on its event loop but small things."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from serve_app.cache.prewarm import cache_status
from serve_app.cache.status import ModelOnNode
from serve_app.config import CacheConfig, IngressConfig, IngressSettings, ModelConfig, parse
from serve_app.errors import UnavailableError
from serve_app.ingress.access import Guard
from serve_app.ingress.access_log import start_log
from serve_app.ingress.asgi import create_app
from serve_app.ingress.directory import Directory, Roll, ServeDirectory, roll_of
from serve_app.ingress.door import Door
from serve_app.ingress.draining import Draining
from serve_app.ingress.finishing import Finishing
from serve_app.ingress.front import is_stopping
from serve_app.ingress.haproxy_page import page_of, put_error_page
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.prometheus import ClusterMetrics
from serve_app.ingress.protocols.open_inference.grpc import OpenInference, OpenInferenceMethods
from serve_app.ingress.reach import serves_this_machine_alone
from serve_app.ingress.served_model import PROBE_TIMEOUT_S, ServedModel
from serve_app.ingress.service import ModelInfo, SettingsRef, TextToken, check_model
from serve_app.ingress.single_flight import SingleFlight
from serve_app.logs import show_log
from serve_app.metrics import IngressMetrics, ReplicaMetrics
from serve_app.outputs import GeneratedPiece
from serve_app.timeouts import within
from serve_app.types import Answer, ModelCard, Request, TokenIds, Usage

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Seconds between two looks at which models there are."""


class Ingress(OpenInferenceMethods):
    """Implements `serve_app.ingress.service.Service` on deployment handles, for HTTP and gRPC."""

    def __init__(self, config: IngressConfig, directory: Directory | None = None) -> None:
        """`directory` is Serve's controller unless given."""
        show_log()
        self._cache_told = SingleFlight(partial(_cache_status, config.cache), 0.0)
        self._cluster_metrics = ClusterMetrics()
        self._directory = directory or ServeDirectory()
        self._metrics = IngressMetrics()
        self._door = Door(None if config.api_keys is None else Guard(KeyRing(config.api_keys)), self._metrics)
        self._settings = SettingsRef(IngressSettings())
        self._draining = Draining(is_stopping, _grace_s)
        self.open_inference = OpenInference(self, self._settings, self._door, self._draining)
        self._replica_metrics = ReplicaMetrics()
        self._finishing = Finishing()
        self._models: list[tuple[str, ModelConfig]] = []
        self._roll = Roll({}, {})
        self._served: dict[str, ServedModel] = {}
        self._needed: set[str] = set()
        self._looking: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        self._put_error_page()
        self.open_inference.local_only = self._door.local_only = serves_this_machine_alone()
        return create_app(self, self._settings, writes_request_id=False, door=self._door)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._settings.current = parse(IngressSettings, user_config, "user_config")
        if self._settings.current.log_requests:
            start_log()
        for served in self._served.values():
            served.reconfigure(self._settings.current)

    async def check_health(self) -> None:
        """An ingress that gets here is healthy: its event loop turns.

        Serve takes a new replica into service after its first check, and by then it knows its models.
        """
        self._replica_metrics.look()
        self._put_error_page()
        if self._looking is not None and self._looking.done():
            self._looking.result()  # raises what ended it, so that Serve replaces this replica
        if self._looking is None:
            await self.look()
            self._needed |= set(self._served)
            self._looking = asyncio.create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except RayError as error:  # the controller is about to come back; until then the models are what they were
                logger.warning("Serve's controller does not say which models there are: %s", error)

    async def look(self) -> None:
        """Learn which models there are, and serve those. Raises RayError if nobody tells."""
        models = list((await self._directory.models()).items())
        if models == self._models:
            return
        roll = roll_of(dict(models))
        for name, application in roll.applications.items():
            if self._roll.applications.get(name) != application:
                self._add(name, application)
        for name in set(self._served) - set(roll.applications):
            self._served.pop(name).remove()
        self._models, self._roll = models, roll

    def _add(self, name: str, application: str) -> None:
        tiers = self._directory.tiers(application, name)
        self._served[name] = ServedModel(name, tiers, self._settings.current, self._metrics, self._finishing)

    def _put_error_page(self) -> None:
        if ray.is_initialized():
            put_error_page(page_of(ray.get_runtime_context().get_node_id()))

    @property
    def models(self) -> Sequence[str]:
        return tuple(self._roll.applications)

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._roll.aliases

    def _model(self, name: str) -> ServedModel:
        """Raises ModelNotFoundError."""
        check_model(name, self.models)
        return self._served[name]

    async def card(self, name: str) -> ModelCard:
        return await self._model(name).card()

    async def answer(self, request: Request) -> Answer:
        return await self._model(request.model).answer(request)

    async def estimate(self, request: Request) -> int:
        return await self._model(request.model).estimate(request)

    async def stream(self, request: Request) -> AsyncGenerator[GeneratedPiece, None]:
        pieces_of_it = self._model(request.model).stream(request)
        async with aclosing(self._draining.bounded(pieces_of_it)) as pieces:
            async for piece in pieces:
                yield piece

    async def tokenize(
        self, model: str, texts: Sequence[str], special_tokens: bool, prompt_name: str | None, usage: Usage
    ) -> Sequence[Sequence[TextToken]]:
        return await self._model(model).tokenize(texts, special_tokens, prompt_name, usage)

    async def decode(
        self, model: str, sequences: Sequence[TokenIds], skip_special_tokens: bool, usage: Usage
    ) -> Sequence[str]:
        return await self._model(model).decode(sequences, skip_special_tokens, usage)

    async def ready(self, name: str | None = None) -> None:
        if name is None and not self._served:
            raise UnavailableError("no model is deployed yet", retry_after_s=1.0)
        for served in self._counted() if name is None else [self._model(name)]:
            await served.ready()

    def _counted(self) -> list[ServedModel]:
        """The models without which this replica is not ready: those that were there first, or have had a version."""
        self._needed |= {name for name, served in self._served.items() if served.has_version}
        return [served for name, served in self._served.items() if name in self._needed]

    def has_version(self, name: str) -> bool:
        return self._model(name).has_version

    async def info(self, name: str) -> ModelInfo:
        return await self._model(name).info()

    def compute_type(self, name: str) -> str:
        return self._model(name).compute_type

    async def metrics_text(self, everything: bool) -> bytes:
        return await self._cluster_metrics.text(everything)

    async def memory(self, name: str) -> str:
        return await self._model(name).memory()

    async def cache(self) -> Sequence[ModelOnNode]:
        return await self._cache_told()


async def _cache_status(cache: CacheConfig) -> Sequence[ModelOnNode]:
    """Raises UnavailableError."""
    try:
        return await within(cache_status(cache), PROBE_TIMEOUT_S)
    except (asyncio.TimeoutError, RayError) as error:
        raise UnavailableError("the cache's warmer does not answer", retry_after_s=1.0) from error


def _grace_s() -> float:
    """Seconds from when Serve stops this replica until it kills it.

    Serve tells a running replica of a new number only together with a new `user_config`.
    """
    timeout_s: float = serve.get_replica_context()._deployment_config.graceful_shutdown_timeout_s
    return timeout_s

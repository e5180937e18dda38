"""The `ingress` deployment: HTTP in, answers out, nothing computed on its event loop but small things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.cache.prewarm import cache_status
from serve_app.cache.status import ModelOnNode
from serve_app.config import AppConfig, IngressSettings, parse
from serve_app.errors import InvalidInputError, ServeAppError, UnavailableError
from serve_app.ingress.access import Guard
from serve_app.ingress.access_log import start_log
from serve_app.ingress.answer_size import check_after, check_before, check_generated, check_made
from serve_app.ingress.asgi import create_app
from serve_app.ingress.backlog import Backlog, tokens_in
from serve_app.ingress.coalescer import Coalescer, Work
from serve_app.ingress.door import Door
from serve_app.ingress.draining import Draining
from serve_app.ingress.finishing import Finishing, steps_after, steps_before
from serve_app.ingress.front import is_stopping
from serve_app.ingress.generation import GenerationPath
from serve_app.ingress.haproxy_page import page_of, put_error_page
from serve_app.ingress.keys import KeyRing
from serve_app.ingress.prometheus import scrape_cluster
from serve_app.ingress.protocols.open_inference.grpc import OpenInference, OpenInferenceMethods
from serve_app.ingress.reach import serves_this_machine_alone
from serve_app.ingress.service import ModelInfo, SettingsRef, TextToken, check_model
from serve_app.ingress.words import text_tokens, texts_of, whole_texts
from serve_app.logs import show_log
from serve_app.metrics import IngressMetrics, ReplicaMetrics
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece, TaskOutput
from serve_app.tasks.generation import GENERATING
from serve_app.tasks.inputs import prompt_of
from serve_app.tasks.registry import ANSWERED_BY, TASKS
from serve_app.tasks.task import Task
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import (
    Answer,
    Chat,
    Features,
    MaskArguments,
    ModelCard,
    ModelState,
    Request,
    TextInput,
    TokenIds,
    TokenizeRequest,
)

READY_FOR_S = 5.0
"""A forward that succeeded this recently proves readiness; without one, a probe runs a forward of its own."""

PROBE_TIMEOUT_S = 5.0

ASK_TIMEOUT_S = 30.0
"""For what a replica says of itself; longer than a probe, because a request may wait for it once, at the start."""


@dataclass(frozen=True, slots=True)
class ModelHandles:
    """Handles to one model's two deployments."""

    tokenizer: Any
    model: Any


class Ingress(OpenInferenceMethods):
    """Implements `serve_app.ingress.service.Service` on deployment handles, for HTTP and gRPC."""

    def __init__(self, config: AppConfig, handles: Mapping[str, ModelHandles]) -> None:
        show_log()
        self._handles = dict(handles)
        self._aliases = config.aliases()
        self._cache = config.cache
        self._door = Door(None if config.api_keys is None else Guard(KeyRing(config.api_keys)))
        self._settings = SettingsRef(IngressSettings())
        self._draining = Draining(is_stopping, _grace_s)
        self.open_inference = OpenInference(self, self._settings, self._door, self._draining)
        self._metrics = IngressMetrics()
        self._replica_metrics = ReplicaMetrics()
        self._backlogs = {name: Backlog(self._settings.current.max_queued_tokens) for name in self._handles}
        self._coalescers = {
            name: Coalescer(
                name, h.tokenizer, h.model, self._settings.current, self._metrics, self._backlogs[name].half_s
            )
            for name, h in self._handles.items()
        }
        self._generating = {
            name: GenerationPath(name, h.tokenizer, h.model, self._metrics, self._backlogs[name].half_s)
            for name, h in self._handles.items()
        }
        self._word_backlogs = {name: Backlog(self._settings.current.max_queued_tokens) for name in self._handles}
        self._cards: dict[str, ModelCard] = {}
        self._states: dict[str, ModelState] = {}
        self._vocabularies: dict[str, Vocabulary] = {}
        self._answered_at: dict[str, float] = {}
        self._finishing = Finishing()

    def __serve_build_asgi_app__(self) -> Any:
        self._put_error_page()
        self.open_inference.local_only = serves_this_machine_alone()
        return create_app(self, self._settings, writes_request_id=False, door=self._door)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._settings.current = parse(IngressSettings, user_config, "user_config")
        if self._settings.current.log_requests:
            start_log()
        for coalescer in self._coalescers.values():
            coalescer.reconfigure(self._settings.current)
        for backlog in (*self._backlogs.values(), *self._word_backlogs.values()):
            backlog.max_tokens = self._settings.current.max_queued_tokens

    async def check_health(self) -> None:
        """An ingress that gets here is healthy: its event loop turns."""
        self._replica_metrics.look()
        self._put_error_page()

    def _put_error_page(self) -> None:
        if ray.is_initialized():
            put_error_page(page_of(ray.get_runtime_context().get_node_id()))

    @property
    def models(self) -> Sequence[str]:
        return tuple(self._handles)

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    async def card(self, name: str) -> ModelCard:
        check_model(name, self.models)
        card = self._cards.get(name)
        if card is None:
            card = self._cards[name] = await self._ask(self._handles[name].tokenizer.card, name)
        return card

    async def answer(self, request: Request) -> Answer:
        started = time.perf_counter()
        try:
            answer = await self._answer(request, started)
        except ServeAppError as error:
            self._count(request, error.code)
            raise
        self._count(request, "ok", answer)
        return answer

    async def estimate(self, request: Request) -> int:
        return _tokens_of(request, await self._answering_card(request))

    async def stream(self, request: Request) -> AsyncGenerator[GeneratedPiece, None]:
        code = "cancelled"
        try:
            async with aclosing(self._draining.bounded(self._pieces(request))) as pieces:
                async for piece in pieces:
                    if piece.truncated:
                        self._metrics.truncated_inputs.inc(1, {"model": request.model})
                    if piece.finish_reason is not None:
                        code = "ok"
                    yield piece
        except ServeAppError as error:
            code = error.code
            raise
        finally:
            self._count(request, code)

    async def _pieces(self, request: Request) -> AsyncGenerator[GeneratedPiece, None]:
        card = await self._answering_card(request)
        if request.task not in GENERATING:
            raise InvalidInputError(f"task {request.task} answers at once; only tasks that generate are streamed")
        if len(request.inputs) != 1:
            raise InvalidInputError(f"inputs: one answer is streamed at a time, and there are {len(request.inputs)}")
        echoes = await self._echoes(request)
        timeout_s = self._timeout_s(request)
        path = self._generating[request.model]
        answer = path.stream(request, card, timeout_s, echoes[0] if echoes else "")
        with self._backlogs[request.model].admitted(_tokens_to_generate(request, card)):
            async with aclosing(answer) as pieces:
                async for piece in pieces:
                    yield piece
        self._answered_at[request.model] = time.monotonic()

    async def _generate(self, request: Request, card: ModelCard) -> Answer:
        check_generated(request, card, self._settings.current.max_answer_bytes)
        echoes = await self._echoes(request)
        path, timeout_s = self._generating[request.model], self._timeout_s(request)
        with self._backlogs[request.model].admitted(_tokens_to_generate(request, card)):
            answer = await path.answer(request, card, timeout_s, echoes)
        self._answered_at[request.model] = time.monotonic()
        return answer

    async def _echoes(self, request: Request) -> list[str] | None:
        """The prompts as texts, where they are wanted before their answers; a conversation is not repeated."""
        if not isinstance(request.options, GenerationOptions) or not request.options.echo:
            return None
        vocabulary = await self._vocabulary(request.model)
        return [_prompt_text(value, vocabulary) for value in request.inputs]

    async def _answering_card(self, request: Request) -> ModelCard:
        """The card of the request's model. Raises InvalidInputError if it does not answer the request's task."""
        card = await self.card(request.model)
        if request.task not in ANSWERED_BY[card.task]:
            can = ", ".join(sorted(ANSWERED_BY[card.task]))
            raise InvalidInputError(f"model {request.model} does not answer task {request.task}; it answers: {can}")
        return card

    async def _answer(self, request: Request, started: float) -> Answer:
        card = await self._answering_card(request)
        if request.task in GENERATING:
            return await self._generate(request, card)
        task = TASKS[request.task]
        vocabulary = await self._vocabulary(request.model) if task.needs_vocabulary else None
        work = await self._work(task, request, card, vocabulary)
        with self._backlogs[request.model].admitted(tokens_in(work.tokenize, card)):
            computed = await self._coalescers[request.model].compute(work, self._timeout_s(request))
        self._answered_at[request.model] = time.monotonic()
        output = await self._output(task, request, card, computed.features, vocabulary)
        timings = replace(computed.timings, total_s=time.perf_counter() - started)
        return Answer(output, computed.tokens, timings, computed.truncated, computed.windows)

    async def _work(self, task: Task, request: Request, card: ModelCard, vocabulary: Vocabulary | None) -> Work:
        steps, settings = steps_before(request), self._settings.current
        prepared = await self._finishing.run(steps, task.prepare, request, card)
        tokenize = replace(prepared, max_windows=settings.max_windows)
        arguments = await self._finishing.run(steps, task.arguments, request, vocabulary)
        check_before(request, tokenize, card, vocabulary, settings.max_answer_bytes)
        return Work(tokenize, task.head, request.priority, arguments)

    async def _output(
        self, task: Task, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> TaskOutput:
        most = self._settings.current.max_answer_bytes
        check_after(request, features, most)
        steps = steps_after(request, features)
        output = await self._finishing.run(steps, task.postprocess, request, card, features, vocabulary)
        check_made(request, output, most)
        return output

    async def _vocabulary(self, model: str) -> Vocabulary:
        vocabulary = self._vocabularies.get(model)
        if vocabulary is None:
            definition = await self._ask(self._handles[model].tokenizer.definition, model)
            if not definition:
                raise InvalidInputError(f"the tokenizer of model {model} has no fast form, which this needs")
            vocabulary = await asyncio.to_thread(Vocabulary.read, definition)
            self._vocabularies[model] = vocabulary
        return vocabulary

    async def tokenize(
        self, model: str, texts: Sequence[str], special_tokens: bool, prompt_name: str | None = None
    ) -> Sequence[Sequence[TextToken]]:
        card, vocabulary = await self.card(model), await self._vocabulary(model)
        prompt = prompt_of(prompt_name, card)
        prompted = [prompt + text for text in texts]
        asked = whole_texts(prompted)
        with self._word_backlogs[model].admitted(tokens_in(asked, card)):
            batch = await self._ask(self._handles[model].tokenizer.tokenize, model, [asked])
            if batch.failures:
                raise batch.failures[0]
            return await asyncio.to_thread(text_tokens, prompted, batch, vocabulary, special_tokens)

    async def decode(self, model: str, sequences: Sequence[TokenIds], skip_special_tokens: bool) -> Sequence[str]:
        check_model(model, self.models)
        vocabulary = await self._vocabulary(model)
        with self._word_backlogs[model].admitted(sum(map(len, sequences))):
            return await asyncio.to_thread(texts_of, sequences, vocabulary, skip_special_tokens)

    async def ready(self, name: str | None = None) -> None:
        if name is not None:
            check_model(name, self.models)
        for model in self.models if name is None else [name]:
            if time.monotonic() - self._answered_at.get(model, -READY_FOR_S) >= READY_FOR_S:
                await self._probe(model)

    async def _probe(self, model: str) -> None:
        """One text through the whole graph."""
        try:
            await asyncio.wait_for(self._probe_tiers(model), PROBE_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise UnavailableError(f"model {model} has not answered a probe yet", retry_after_s=1.0) from error
        except ServeAppError as error:
            raise UnavailableError(f"model {model} does not answer: {error.message}", retry_after_s=1.0) from error
        self._answered_at[model] = time.monotonic()

    async def _probe_tiers(self, model: str) -> None:
        card = await self.card(model)
        if card.task in GENERATING:
            await self._generating[model].probe(PROBE_TIMEOUT_S)
            return
        arguments = MaskArguments(top_k=1) if card.task == "fill-mask" else None
        work = Work(TokenizeRequest(("ok",), "truncate"), TASKS[card.task].head, arguments=arguments)
        await self._coalescers[model].compute(work, PROBE_TIMEOUT_S)

    async def info(self, name: str) -> ModelInfo:
        card = await self.card(name)
        try:
            self._states[name] = await self._ask(self._handles[name].model.describe, name)
        except UnavailableError:
            return ModelInfo(card, self._states.get(name))
        return ModelInfo(card, self._states[name])

    def compute_type(self, name: str) -> str:
        state = self._states.get(name)
        return "gpu" if state is not None and state.device.startswith("cuda") else "cpu"

    async def metrics_text(self) -> bytes:
        return await scrape_cluster()

    async def memory(self, name: str) -> str:
        check_model(name, self.models)
        return str(await self._ask(self._handles[name].model.memory_summary, name))

    async def cache(self) -> Sequence[ModelOnNode]:
        try:
            return await asyncio.wait_for(cache_status(self._cache), PROBE_TIMEOUT_S)
        except (asyncio.TimeoutError, RayError) as error:
            raise UnavailableError("the cache's warmer does not answer", retry_after_s=1.0) from error

    async def _ask(self, method: Any, name: str, *arguments: Any) -> Any:
        try:
            return await asyncio.wait_for(method.remote(*arguments), ASK_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise UnavailableError(f"model {name} is starting", retry_after_s=1.0) from error
        except (RayError, RayServeException) as error:
            raise UnavailableError(f"a replica of model {name} was lost", retry_after_s=1.0) from error

    def _timeout_s(self, request: Request) -> float:
        most = self._settings.current.request_timeout_s
        return most if request.timeout_s is None else min(most, request.timeout_s)

    def _count(self, request: Request, code: str, answer: Answer | None = None) -> None:
        model = {"model": request.model}
        self._metrics.requests.inc(1, {**model, "task": request.task, "code": code})
        if answer is None:
            return
        if answer.tokens:
            self._metrics.tokens.inc(answer.tokens, model)
        if answer.truncated:
            self._metrics.truncated_inputs.inc(answer.truncated, model)
        times = answer.timings
        for stage, seconds in (
            ("tokenize", times.tokenize_s),
            ("queue", times.queue_s),
            ("forward", times.forward_s),
            ("total", times.total_s),
        ):
            self._metrics.stage_seconds.observe(seconds, {**model, "stage": stage})


def _grace_s() -> float:
    """Seconds from when Serve stops this replica until it kills it.

    Serve tells a running replica of a new number only together with a new `user_config`.
    """
    timeout_s: float = serve.get_replica_context()._deployment_config.graceful_shutdown_timeout_s
    return timeout_s


def _tokens_of(request: Request, card: ModelCard) -> int:
    """An estimate of what answering costs."""
    if request.task in GENERATING:
        return _tokens_to_generate(request, card)
    return tokens_in(TASKS[request.task].prepare(request, card), card)


def _tokens_to_generate(request: Request, card: ModelCard) -> int:
    """An estimate: those of the prompts, and for each the new ones that it asks for."""
    assert isinstance(request.options, GenerationOptions)
    prompts = tokens_in(GENERATING[request.task].prepare(request, card), card)
    return prompts + len(request.inputs) * (request.options.max_new_tokens or 0)


def _prompt_text(value: TextInput, vocabulary: Vocabulary) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Chat):
        return ""
    return vocabulary.decode([part for part in value if isinstance(part, int)], skip_special_tokens=True)

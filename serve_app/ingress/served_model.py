"""One model as an ingress replica serves it: its tiers, what it knows of each version, and the work under way.

During a roll-out a model has replicas of two versions. A request begins with a version of which both tiers have a
replica, and everything that belongs to the answer is of that version: card, vocabulary, tokens and rows. If its last
replica leaves meanwhile, the request begins again with another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.config import IngressSettings
from serve_app.errors import InvalidInputError, ModelNotFoundError, ServeAppError, UnavailableError, VersionGoneError
from serve_app.ingress.answer_size import check_after, check_before, check_generated, check_made
from serve_app.ingress.backlog import Backlog, tokens_in
from serve_app.ingress.coalescer import Coalescer, Work
from serve_app.ingress.finishing import Finishing, steps_after, steps_before
from serve_app.ingress.generation import GenerationPath
from serve_app.ingress.service import ModelInfo, TextToken
from serve_app.ingress.shared_call import Losses, is_lost
from serve_app.ingress.single_flight import SingleFlight
from serve_app.ingress.tier import Tier
from serve_app.ingress.words import text_tokens, texts_of, whole_texts
from serve_app.metrics import IngressMetrics
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece, TaskOutput
from serve_app.tasks import probe
from serve_app.tasks.generation import GENERATING, beams_of, most_new_tokens
from serve_app.tasks.inputs import prompt_of
from serve_app.tasks.registry import ANSWERED_BY, TASKS
from serve_app.tasks.task import Task
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.timeouts import within
from serve_app.types import (
    Answer,
    Chat,
    Features,
    ModelCard,
    ModelState,
    Request,
    TextInput,
    TokenIds,
    TokenizeCall,
    Usage,
    Version,
    VersionCall,
)

READY_FOR_S = 5.0
"""A forward that succeeded this recently proves readiness; without one, a probe runs a forward of its own."""

PROBE_TIMEOUT_S = 5.0

PROBE_KEPT_S = 1.0
"""Seconds after a probe in which its outcome is told again: a model that does not answer is asked once a second."""

ASK_TIMEOUT_S = 30.0
"""For a version to be there, and for what a replica says of itself; longer than a probe, because a request may wait for
it once, at the start."""

VERSION_TRIES = 3
"""How often a request begins, where version after version leaves before it is done."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelTiers:
    """Both tiers of one model."""

    tokenizer: Tier
    model: Tier


@dataclass(slots=True)
class _Known:
    """What this replica has asked of one version."""

    version: Version
    card: ModelCard | None = None
    vocabulary: Vocabulary | None = None
    state: ModelState | None = None


class ServedModel:
    """Belongs to one event loop. Every method may be called concurrently, and its caller may be cancelled."""

    def __init__(
        self, name: str, tiers: ModelTiers, settings: IngressSettings, metrics: IngressMetrics, finishing: Finishing
    ) -> None:
        self.name = name
        self.tiers = tiers
        self._settings = settings
        self._metrics = metrics
        self._finishing = finishing
        self._backlog = Backlog(settings.max_queued_tokens)
        self._word_backlog = Backlog(settings.max_queued_tokens)
        self._coalescer = Coalescer(name, tiers.tokenizer, tiers.model, settings, metrics, self._backlog.half_s)
        self._generating = GenerationPath(name, tiers.tokenizer, tiers.model, metrics, self._backlog.half_s)
        self._known: dict[str, _Known] = {}
        self._proven = SingleFlight(self._prove, PROBE_KEPT_S)
        self._told_info = SingleFlight(self._info, 0.0)
        self._told_memory = SingleFlight(self._memory, 0.0)
        self._answered_at = -READY_FOR_S
        self._is_removed = False
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()  # Serve may be told to run routers on another one
        for tier in (tiers.tokenizer, tiers.model):
            tier.view.on_change = partial(loop.call_soon_threadsafe, self._wake)

    def reconfigure(self, settings: IngressSettings) -> None:
        self._settings = settings
        self._coalescer.reconfigure(settings)
        for backlog in (self._backlog, self._word_backlog):
            backlog.max_tokens = settings.max_queued_tokens

    def remove(self) -> None:
        """The model is served no more: requests that wait for a version get ModelNotFoundError."""
        self._is_removed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def answer(self, request: Request) -> Answer:
        """Raises ServeAppError."""
        started = time.perf_counter()
        deadline, losses = time.monotonic() + self._timeout_s(request), set[int]()
        answer = await self._begin(deadline, lambda known: self._answer(request, known, deadline, losses))
        return replace(answer, timings=replace(answer.timings, total_s=time.perf_counter() - started))

    async def stream(self, request: Request) -> AsyncGenerator[GeneratedPiece, None]:
        """The one input's answer in pieces. Iterating raises ServeAppError, before the first piece or later."""
        deadline, losses = time.monotonic() + self._timeout_s(request), set[int]()
        for tries_left in reversed(range(VERSION_TRIES)):
            known = self._of(await self._version(deadline))
            sent = False
            try:
                async with aclosing(self._pieces(request, known, deadline, losses)) as pieces:
                    async for piece in pieces:
                        yield piece if sent else replace(piece, revision=known.version.revision)
                        sent = True
                return
            except VersionGoneError:
                if sent or not tries_left:
                    raise

    async def estimate(self, request: Request) -> int:
        """Tokens that computing the request will take, roughly. Raises what `answer` would before it computes."""
        return _tokens_of(request, await self._begin(self._soon(), lambda known: self._answering_card(request, known)))

    async def card(self) -> ModelCard:
        return await self._begin(self._soon(), self._card)

    async def tokenize(
        self, texts: Sequence[str], special_tokens: bool, prompt_name: str | None, usage: Usage
    ) -> Sequence[Sequence[TextToken]]:
        async def work(known: _Known) -> Sequence[Sequence[TextToken]]:
            card, vocabulary = await self._card(known), await self._vocabulary(known)
            prompt = prompt_of(prompt_name, card)
            prompted = [prompt + text for text in texts]
            asked = whole_texts(prompted)
            with self._word_backlog.admitted(tokens_in(asked, card)), usage.computing():
                call = TokenizeCall((asked,), known.version.fingerprint)
                batch = await self._ask(self.tiers.tokenizer.handle.tokenize, call)
                if batch.failures:
                    raise batch.failures[0]
                usage.tokens += len(batch.input_ids)
                return await asyncio.to_thread(text_tokens, prompted, batch, vocabulary, special_tokens)

        return await self._begin(self._soon(), work)

    async def decode(self, sequences: Sequence[TokenIds], skip_special_tokens: bool, usage: Usage) -> Sequence[str]:
        tokens = sum(map(len, sequences))
        vocabulary = await self._begin(self._soon(), self._vocabulary)
        with self._word_backlog.admitted(tokens):
            usage.tokens += tokens
            return await asyncio.to_thread(texts_of, sequences, vocabulary, skip_special_tokens)

    async def ready(self) -> None:
        """Return if the model has answered lately, or does now: all who ask at the same time share one probe.

        Raises UnavailableError.
        """
        if time.monotonic() - self._answered_at >= READY_FOR_S:
            await self._proven()

    async def _prove(self) -> None:
        try:
            await within(self._probe(), PROBE_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise UnavailableError(f"model {self.name} has not answered a probe yet", retry_after_s=1.0) from error
        except ServeAppError as error:
            raise UnavailableError(f"model {self.name} does not answer: {error.message}", retry_after_s=1.0) from error
        self._answered_at = time.monotonic()

    async def info(self) -> ModelInfo:
        return await self._told_info()

    async def _info(self) -> ModelInfo:
        async def work(known: _Known) -> ModelInfo:
            card = await self._card(known)
            try:
                known.state = await self._ask(self.tiers.model.handle.describe, _call(known))
            except VersionGoneError:
                raise
            except UnavailableError:
                pass  # what it said last is told
            return ModelInfo(card, known.state, known.version)

        return await self._begin(self._soon(), work)

    @property
    def has_version(self) -> bool:
        return bool(self._versions)

    @property
    def _versions(self) -> frozenset[Version]:
        """Versions of which both tiers have a replica."""
        return self.tiers.tokenizer.view.versions & self.tiers.model.view.versions

    @property
    def compute_type(self) -> str:
        """What the model runs on, "cpu" or "gpu", as far as is known."""
        states = [known.state for known in self._known.values() if known.state is not None]
        return "gpu" if any(state.device.startswith("cuda") for state in states) else "cpu"

    async def memory(self) -> str:
        """A model replica's report of its memory, for a person."""
        return await self._told_memory()

    async def _memory(self) -> str:
        return await self._begin(
            self._soon(), lambda known: self._ask(self.tiers.model.handle.memory_summary, _call(known))
        )

    async def _begin(self, deadline: float, work: Callable[[_Known], Awaitable[T]]) -> T:
        """`work` with a version, again with another one if that leaves meanwhile. Raises what `work` raises."""
        for tries_left in reversed(range(VERSION_TRIES)):
            try:
                return await work(self._of(await self._version(deadline)))
            except VersionGoneError:  # noqa: PERF203
                if not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _version(self, deadline: float) -> Version:
        """A version that can answer, the one whose replicas have the least to do.

        Raises UnavailableError if there is none before `deadline`, or for long.
        """
        until = min(deadline, self._soon())
        while True:
            both = self._versions
            if len(both) == 1:
                return next(iter(both))
            if both:
                return min(both, key=self.tiers.model.view.load_of)
            if self._is_removed:
                raise ModelNotFoundError(f"model {self.name} is served no more")
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise UnavailableError(f"model {self.name} is starting", retry_after_s=1.0)
            try:
                await within(self._changed.wait(), left_s)
            except asyncio.TimeoutError:
                continue

    def _of(self, version: Version) -> _Known:
        known = self._known.get(version.fingerprint)
        if known is None:
            there = {version.fingerprint for version in self.tiers.tokenizer.view.versions}
            self._known = {name: known for name, known in self._known.items() if name in there}
            known = self._known[version.fingerprint] = _Known(version)
        return known

    async def _card(self, known: _Known) -> ModelCard:
        if known.card is None:
            known.card = await self._ask(self.tiers.tokenizer.handle.card, _call(known))
        return known.card

    async def _answering_card(self, request: Request, known: _Known) -> ModelCard:
        """The card of that version. Raises InvalidInputError if it does not answer the request's task."""
        card = await self._card(known)
        if request.task not in ANSWERED_BY[card.task]:
            can = ", ".join(sorted(ANSWERED_BY[card.task]))
            raise InvalidInputError(f"model {self.name} does not answer task {request.task}; it answers: {can}")
        return card

    async def _vocabulary(self, known: _Known) -> Vocabulary:
        if known.vocabulary is None:
            definition = await self._ask(self.tiers.tokenizer.handle.definition, _call(known))
            if not definition:
                raise InvalidInputError(f"the tokenizer of model {self.name} has no fast form, which this needs")
            known.vocabulary = await asyncio.to_thread(Vocabulary.read, definition)
        return known.vocabulary

    async def _answer(self, request: Request, known: _Known, deadline: float, losses: Losses) -> Answer:
        card = await self._answering_card(request, known)
        answering = self._generate if request.task in GENERATING else self._encode
        answer = await answering(request, card, known, deadline, losses)
        self._answered_at = time.monotonic()
        return replace(answer, version=known.version)

    async def _encode(
        self, request: Request, card: ModelCard, known: _Known, deadline: float, losses: Losses
    ) -> Answer:
        task = TASKS[request.task]
        vocabulary = await self._vocabulary(known) if task.needs_vocabulary else None
        work = await self._work(task, request, card, known.version, vocabulary)
        with self._backlog.admitted(tokens_in(work.tokenize, card), request.priority), request.usage.computing():
            computed = await self._coalescer.compute(work, deadline - time.monotonic(), losses)
        request.usage.tokens += computed.tokens
        output = await self._output(task, request, card, computed.features, vocabulary)
        return Answer(output, computed.tokens, computed.timings, computed.truncated, computed.windows)

    async def _work(
        self, task: Task, request: Request, card: ModelCard, version: Version, vocabulary: Vocabulary | None
    ) -> Work:
        steps, settings = steps_before(request), self._settings
        prepared = await self._finishing.run(steps, task.prepare, request, card)
        tokenize = replace(prepared, max_windows=settings.max_windows)
        arguments = await self._finishing.run(steps, task.arguments, request, vocabulary)
        check_before(request, tokenize, card, vocabulary, settings.max_answer_bytes)
        return Work(tokenize, task.head, version.fingerprint, request.priority, arguments)

    async def _output(
        self, task: Task, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> TaskOutput:
        most = self._settings.max_answer_bytes
        check_after(request, features, most)
        steps = steps_after(request, features)
        output = await self._finishing.run(steps, task.postprocess, request, card, features, vocabulary)
        check_made(request, output, most)
        return output

    async def _generate(
        self, request: Request, card: ModelCard, known: _Known, deadline: float, losses: Losses
    ) -> Answer:
        check_generated(request, card, self._settings.max_answer_bytes)
        echoes = await self._echoes(request, known)
        with self._backlog.admitted(_tokens_to_generate(request, card), request.priority), request.usage.computing():
            left_s = deadline - time.monotonic()
            return await self._generating.answer(request, card, known.version.fingerprint, left_s, echoes, losses)

    async def _pieces(
        self, request: Request, known: _Known, deadline: float, losses: Losses
    ) -> AsyncGenerator[GeneratedPiece, None]:
        card = await self._answering_card(request, known)
        if request.task not in GENERATING:
            raise InvalidInputError(f"task {request.task} answers at once; only tasks that generate are streamed")
        if len(request.inputs) != 1:
            raise InvalidInputError(f"inputs: one answer is streamed at a time, and there are {len(request.inputs)}")
        echoes = await self._echoes(request, known)
        left_s, fingerprint = deadline - time.monotonic(), known.version.fingerprint
        answer = self._generating.stream(request, card, fingerprint, left_s, echoes[0] if echoes else "", losses)
        with self._backlog.admitted(_tokens_to_generate(request, card), request.priority), request.usage.computing():
            async with aclosing(answer) as pieces:
                async for piece in pieces:
                    request.usage.is_uncertain = not request.usage.tokens  # each token is counted as it comes
                    yield piece
        self._answered_at = time.monotonic()

    async def _echoes(self, request: Request, known: _Known) -> list[str] | None:
        """The prompts as texts, where they are wanted before their answers; a conversation is not repeated."""
        if not isinstance(request.options, GenerationOptions) or not request.options.echo:
            return None
        vocabulary = await self._vocabulary(known)
        return [_prompt_text(value, vocabulary) for value in request.inputs]

    async def _probe(self) -> None:
        """One text through both tiers."""

        async def work(known: _Known) -> None:
            card, fingerprint = await self._card(known), known.version.fingerprint
            if card.task in GENERATING:
                await self._generating.probe(fingerprint, PROBE_TIMEOUT_S)
                return
            arguments, head = probe.head_arguments(card.task), TASKS[card.task].head
            text = Work(probe.TEXT, head, fingerprint, arguments=arguments)
            await self._coalescer.compute(text, PROBE_TIMEOUT_S)

        await self._begin(time.monotonic() + PROBE_TIMEOUT_S, work)

    async def _ask(self, method: Any, call: TokenizeCall | VersionCall) -> Any:
        """What a replica says, another one if the first is lost. Raises what it raises, and UnavailableError."""
        try:
            return await within(self._ask_twice(method, call), ASK_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise UnavailableError(f"model {self.name} is starting", retry_after_s=1.0) from error

    async def _ask_twice(self, method: Any, call: TokenizeCall | VersionCall) -> Any:
        try:
            return await self._ask_once(method, call)
        except UnavailableError as error:
            if not is_lost(error):
                raise
            return await self._ask_once(method, call)

    async def _ask_once(self, method: Any, call: TokenizeCall | VersionCall) -> Any:
        try:
            return await method.remote(call)
        except RayTaskError as error:
            if isinstance(error.cause, ServeAppError):
                raise error.cause from None
            raise UnavailableError(f"a replica of model {self.name} failed", retry_after_s=1.0) from error
        except (RayError, RayServeException) as error:
            raise UnavailableError(f"a replica of model {self.name} was lost", retry_after_s=1.0) from error

    def _timeout_s(self, request: Request) -> float:
        most = self._settings.request_timeout_s
        return most if request.timeout_s is None else min(most, request.timeout_s)

    def _soon(self) -> float:
        return time.monotonic() + ASK_TIMEOUT_S


def _call(known: _Known) -> VersionCall:
    return VersionCall(known.version.fingerprint)


def _tokens_of(request: Request, card: ModelCard) -> int:
    """An estimate of what answering costs."""
    if request.task in GENERATING:
        return _tokens_to_generate(request, card)
    return tokens_in(TASKS[request.task].prepare(request, card), card)


def _tokens_to_generate(request: Request, card: ModelCard) -> int:
    """An estimate: those of the prompts, and for each the most new ones of each beam that request and model allow,
    as often as there are answers.
    """
    assert isinstance(request.options, GenerationOptions)
    prompts, count = tokens_in(GENERATING[request.task].prepare(request, card), card), len(request.inputs)
    new = most_new_tokens(request, card, prompts // count) * beams_of(request.options, card)
    return request.options.n * (prompts + count * new)


def _prompt_text(value: TextInput, vocabulary: Vocabulary) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Chat):
        return ""
    return vocabulary.decode([part for part in value if isinstance(part, int)], skip_special_tokens=True)

"""One generating model's way through the tiers: a prompt is tokenized, then its answer comes back in pieces."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from serve_app.errors import (
    DeadlineExceededError,
    OverloadedError,
    ServeAppError,
    UnavailableError,
)
from serve_app.ingress.coalescer import REPLICA_LOST
from serve_app.ingress.shared_call import Losses, OneByOne, Pulse, Stage, is_lost, lost_again
from serve_app.ingress.tier import Tier
from serve_app.metrics import IngressMetrics
from serve_app.options import GenerationOptions
from serve_app.outputs import Generated, GeneratedPiece
from serve_app.tasks import probe
from serve_app.tasks.generation import GENERATING, beams_of, collected, speaks_by_prefix
from serve_app.timeouts import within
from serve_app.types import (
    Answer,
    Chat,
    GenerationCall,
    Int32Array,
    ModelCard,
    Request,
    Timings,
    TokenBatch,
    TokenizeCall,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)

CALLS_PER_REQUEST = 64
"""Prompts of one request that are with replicas at a time: as many as one replica answers at once by default. Further
ones wait here, where they hold no stream and none of the places that other requests need."""

TEXTS = -1
"""Stands for the call to a tokenizer replica, with all prompts of a request, where losses are remembered."""

GRACE_S = 2.0
"""The replica ends a late answer itself; one that has not by then is lost."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """A request's inputs as token ids, and what making them took."""

    input_ids: tuple[Int32Array, ...]
    truncated: int
    tokenize_s: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))


@dataclass(frozen=True, slots=True)
class Sending:
    """What all calls of one request share; `deadline` on time.monotonic's clock."""

    version: str
    deadline: float
    losses: Losses

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def lost(self, prompt: int, error: UnavailableError) -> None:
        """Remember that the call with that prompt was lost. Raises `error` again if it tells something else."""
        if not is_lost(error):
            raise error
        self.losses.add(prompt)


@dataclass(slots=True)
class Progress:
    """How far a request has come."""

    stage: Stage = "tokenize"
    is_complete: bool = False


class GenerationPath:
    """Everything that one ingress replica sends to one generating model's replicas. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        tokenizer: Tier,
        model: Tier,
        metrics: IngressMetrics,
        wait_s: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`wait_s` is how long to stay away where no replica takes more."""
        self._name = name
        self._tokenizer = tokenizer
        self._model = model
        self._metrics = metrics
        self._wait_s = wait_s
        self._again = OneByOne()
        self._call_ids = map(f"{secrets.token_hex(8)}-{{}}".format, itertools.count())

    async def answer(
        self,
        request: Request,
        card: ModelCard,
        version: str,
        timeout_s: float,
        echoes: Sequence[str] | None = None,
        losses: Losses | None = None,
    ) -> Answer:
        """Every input's whole answer, each after its text in `echoes`, by replicas of the version of that fingerprint.

        `losses` are those of the request so far. Raises ServeAppError; cancelling it cancels what is under way.
        """
        started = time.perf_counter()
        sending = Sending(version, time.monotonic() + timeout_s, set() if losses is None else losses)
        with self._under_way() as progress:
            prompts = await self._prompts(request, card, sending)
            progress.stage, tokenized = "model", time.perf_counter()
            under_way, count = asyncio.Semaphore(CALLS_PER_REQUEST), _choices(request)

            async def answered(prompt: int, ids: Int32Array, choice: int) -> Generated:
                async with under_way:
                    call = self._call(ids, request, card, sending, choice)
                    pieces = self._pieces(call, sending, prompt * count + choice)
                    return await self._whole(_counted(pieces, call, request, card))

            tasks = [
                asyncio.ensure_future(answered(prompt, ids, choice))
                for prompt, ids in enumerate(prompts.input_ids)
                for choice in range(count)
            ]
            try:
                generated = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        now = time.perf_counter()
        if echoes is not None:
            repeated = [echo for echo in echoes for _ in range(count)]
            generated = [replace(one, text=echo + one.text) for echo, one in zip(repeated, generated, strict=True)]
        timings = Timings(now - started, prompts.tokenize_s, forward_s=now - tokenized)
        return Answer(tuple(generated), prompts.tokens, timings, prompts.truncated)

    def _call(
        self, ids: Int32Array, request: Request, card: ModelCard, sending: Sending, choice: int = 0
    ) -> GenerationCall:
        options = _options(request, card, choice)
        return GenerationCall(ids, options, priority=request.priority, version=sending.version)

    async def _whole(self, answer: AsyncGenerator[list[GeneratedPiece], None]) -> Generated:
        pieces: list[GeneratedPiece] = []
        async with aclosing(answer) as lists:
            async for some in lists:
                pieces.extend(some)
        return collected(pieces)

    async def stream(
        self,
        request: Request,
        card: ModelCard,
        version: str,
        timeout_s: float,
        echo: str = "",
        losses: Losses | None = None,
    ) -> AsyncGenerator[GeneratedPiece, None]:
        """The first input's answer, piece by piece, after `echo`. Closing it cancels the work.

        `losses` are those of the request so far.
        """
        sending = Sending(version, time.monotonic() + timeout_s, set() if losses is None else losses)
        with self._under_way() as progress:
            unfinished = _choices(request)
            async with aclosing(self._streamed(request, card, sending, echo, progress)) as pieces:
                async for piece in pieces:
                    unfinished -= piece.finish_reason is not None
                    progress.is_complete = not unfinished
                    yield piece

    async def _streamed(
        self, request: Request, card: ModelCard, sending: Sending, echo: str, progress: Progress
    ) -> AsyncGenerator[GeneratedPiece, None]:
        prompts = await self._prompts(request, card, sending)
        progress.stage = "model"
        ids, untold = prompts.input_ids[0], bool(prompts.truncated)
        if echo:
            for choice in range(_choices(request)):
                yield GeneratedPiece(echo, prompt_tokens=len(ids), truncated=untold, choice=choice)
                untold = False
        if _choices(request) == 1:
            call = self._call(ids, request, card, sending)
            answer = _counted(self._pieces(call, sending), call, request, card)
        else:
            answer = self._choices_streamed(ids, request, card, sending)
        async with aclosing(answer) as lists:
            async for some in lists:
                for piece in some:
                    yield replace(piece, truncated=True) if untold else piece
                    untold = False

    async def _choices_streamed(
        self, ids: Int32Array, request: Request, card: ModelCard, sending: Sending
    ) -> AsyncGenerator[list[GeneratedPiece], None]:
        """The answers' pieces as they come. The first error of one ends all."""
        found: asyncio.Queue[list[GeneratedPiece] | None] = asyncio.Queue()  # bounded by the answers' limits of tokens
        under_way = asyncio.Semaphore(CALLS_PER_REQUEST)

        async def streamed(choice: int) -> None:
            async with under_way:
                call = self._call(ids, request, card, sending, choice)
                async with aclosing(_counted(self._pieces(call, sending, choice), call, request, card)) as lists:
                    async for some in lists:
                        found.put_nowait([replace(piece, choice=choice) for piece in some])

        async def all_streamed() -> None:
            try:
                await asyncio.gather(*tasks)
            finally:
                found.put_nowait(None)

        tasks = [asyncio.ensure_future(streamed(choice)) for choice in range(_choices(request))]
        ended = asyncio.ensure_future(all_streamed())
        try:
            while (some := await found.get()) is not None:
                yield some
            await ended
        finally:
            for task in (ended, *tasks):
                task.cancel()
            await asyncio.gather(ended, *tasks, return_exceptions=True)

    @contextmanager
    def _under_way(self) -> Iterator[Progress]:
        """Counts a request that nobody waits for any more before its answer is complete."""
        progress = Progress()
        try:
            yield progress
        except (asyncio.CancelledError, GeneratorExit):
            if not progress.is_complete:
                self._metrics.abandoned_requests.inc(1, {"model": self._name, "stage": progress.stage})
            raise

    async def probe(self, version: str, timeout_s: float) -> None:
        """One token through the whole graph. Raises ServeAppError."""
        sending = Sending(version, time.monotonic() + timeout_s, set())
        (ids,) = (await self._tokenized(probe.TEXT, sending)).input_ids
        call = GenerationCall(ids, probe.ONE_TOKEN, version=version)
        async with aclosing(self._pieces(call, sending)) as lists:
            async for _ in lists:
                pass

    async def _prompts(self, request: Request, card: ModelCard, sending: Sending) -> Prompts:
        return await self._tokenized(GENERATING[request.task].prepare(request, card), sending)

    async def _tokenized(self, request: TokenizeRequest, sending: Sending) -> Prompts:
        tokens = await self._tokens(request, sending)
        if tokens.failures:
            raise tokens.failures[0]
        ids = tuple(tokens.select(i, i + 1).input_ids for i in range(tokens.num_sequences))
        return Prompts(ids, int(tokens.truncated.sum()), tokens.tokenize_s)

    async def _tokens(self, request: TokenizeRequest, sending: Sending) -> TokenBatch:
        """Once, and once more, by itself, if the replica was lost."""
        if TEXTS not in sending.losses:
            try:
                return await self._tokenize(request, sending)
            except UnavailableError as error:
                sending.lost(TEXTS, error)
        async with self._again.turn(sending.deadline):
            self._tell_again()
            try:
                return await self._tokenize(request, sending)
            except UnavailableError as error:
                raise lost_again(error) from error.__cause__

    async def _tokenize(self, request: TokenizeRequest, sending: Sending) -> TokenBatch:
        call = TokenizeCall((request,), sending.version, next(self._call_ids))
        response = self._tokenizer.handle.tokenize.remote(call)
        with Pulse(self._tokenizer, call.id, response.cancel) as pulse:
            batch: TokenBatch = await _in_time(response, sending.deadline, self._wait_s, pulse)
        return batch

    async def _pieces(
        self, call: GenerationCall, sending: Sending, prompt: int = 0
    ) -> AsyncGenerator[list[GeneratedPiece], None]:
        """Once, and once more, by itself, if the replica was lost before anything had come."""
        if prompt not in sending.losses:
            sent = False
            try:
                async with aclosing(self._one_try(call, sending)) as lists:
                    async for some in lists:
                        yield some
                        sent = True
                return
            except UnavailableError as error:
                if sent:
                    raise
                sending.lost(prompt, error)
        async with aclosing(self._one_try(call, sending)) as lists:
            yield await self._first(lists, sending)
            async for some in lists:
                yield some

    async def _first(self, lists: AsyncGenerator[list[GeneratedPiece], None], sending: Sending) -> list[GeneratedPiece]:
        """The first pieces of a call that is sent again: once they are there, it is not what a replica dies of."""
        async with self._again.turn(sending.deadline):
            self._tell_again()
            try:
                return await anext(lists)
            except UnavailableError as error:
                raise lost_again(error) from error.__cause__

    def _tell_again(self) -> None:
        logger.warning("a request for model %s is sent again", self._name)
        self._metrics.retries.inc(1, {"model": self._name})

    async def _one_try(self, call: GenerationCall, sending: Sending) -> AsyncGenerator[list[GeneratedPiece], None]:
        call = replace(call, time_left_s=sending.left_s, id=next(self._call_ids))
        response = self._model.handle.options(stream=True).stream.remote(call)
        ended = False
        with Pulse(self._model, call.id, response.cancel) as pulse:
            try:
                while not ended:
                    some: list[GeneratedPiece] = await _in_time(anext(response), sending.deadline, self._wait_s, pulse)
                    ended = some[-1].finish_reason is not None
                    yield some
            except StopAsyncIteration as error:
                raise UnavailableError("the replica ended its answer too early", retry_after_s=1.0) from error
            finally:
                if not ended:
                    response.cancel()


async def _counted(
    answer: AsyncGenerator[list[GeneratedPiece], None], call: GenerationCall, request: Request, card: ModelCard
) -> AsyncGenerator[list[GeneratedPiece], None]:
    """One prompt's `answer`, each part counted in the request's usage when it comes, the prompt with the first."""
    assert isinstance(request.options, GenerationOptions)
    beams, uncounted = beams_of(request.options, card), len(call.input_ids)
    async with aclosing(answer) as lists:
        async for some in lists:
            request.usage.tokens += uncounted + beams * sum(piece.token is not None for piece in some)
            uncounted = 0
            yield some


async def _in_time(answer: Any, deadline: float, wait_s: Callable[[], float], pulse: Pulse) -> Any:
    """What a replica answers, with its errors as ours."""
    try:
        return await within(answer, max(0.0, deadline - time.monotonic()) + GRACE_S)
    except asyncio.TimeoutError as error:
        raise DeadlineExceededError("the request's time ran out before its answer was complete") from error
    except asyncio.CancelledError as error:
        pulse.raise_if_lost(error)
        raise
    except RayTaskError as error:
        if isinstance(error.cause, ServeAppError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise OverloadedError("every replica's queue is full; try again later", retry_after_s=wait_s()) from error
    except REPLICA_LOST as error:
        logger.warning("a replica was lost: %s", str(error).split("\n")[0][:200])
        raise UnavailableError("the replica that computed this request was lost", retry_after_s=1.0) from error


def _choices(request: Request) -> int:
    """Answers to each input."""
    assert isinstance(request.options, GenerationOptions)
    return request.options.n


def _options(request: Request, card: ModelCard, choice: int) -> GenerationOptions:
    """As the replica needs to know them, for one of the answers to an input.

    A language that is chosen by the text's prefix is none of its business; where a turn ends is.
    """
    options = request.options
    assert isinstance(options, GenerationOptions)
    if request.task == "translation" and speaks_by_prefix(card):
        options = replace(options, source_language=None, target_language=None)
    if card.turn_end_ids and not options.ignore_eos and isinstance(request.inputs[0], Chat):
        options = replace(options, stop_token_ids=options.stop_token_ids + card.turn_end_ids)
    if choice and options.seed is not None:
        options = replace(options, seed=(options.seed + choice) % 2**63)
    return options

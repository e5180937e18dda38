"""What completions and chats share: options, usage and the reasons for an end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from serve_app import __version__
from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import Body, InferenceBody
from serve_app.ingress.protocols.generation import GenerationFields, NewTokens, bias
from serve_app.ingress.streaming import Events
from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece
from serve_app.types import LongTexts, Request

MOST_CHOICES = 128
_MOST_BIASES = 1024


class StreamOptions(Body):
    """What a stream has beside the answer."""

    include_usage: bool | None = Field(None, description="Send the usage in an event of its own, at the end.")


class SamplingBody(GenerationFields, InferenceBody):
    """How an answer is made; `temperature` 0 is greedy, left out it is as the model's generation config says."""

    max_tokens: NewTokens = None
    min_tokens: Annotated[int | None, Field(ge=0, description="As `min_new_tokens`, which wins.")] = None
    n: Annotated[
        int | None,
        Field(ge=1, le=MOST_CHOICES, description="Answers to each prompt; with a seed, each has the next seed."),
    ] = None
    logit_bias: dict[str, Any] | None = Field(
        None, description="What is added to the logits of tokens, by token id; -100 all but bans one."
    )
    truncate_prompt_tokens: Annotated[
        int | None,
        Field(ge=-1, description="Keep so many tokens of the prompt's end, as `truncate`; -1: what the model takes."),
    ] = None
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def prompt_tokens(self) -> int | None:
        told = self.truncate_prompt_tokens
        return super().prompt_tokens if told is None or told < 0 else told

    def choice(self) -> LongTexts | None:
        chosen = super().choice()
        return "truncate" if chosen is None and self.truncate_prompt_tokens == -1 else chosen

    def chosen(self, max_new_tokens: int | None, logprobs: int | None, **more: Any) -> GenerationOptions:
        """`max_new_tokens` is what the request says by any of its names."""
        if self.truncate_prompt_tokens == 0:
            raise MalformedRequestError("`truncate_prompt_tokens`: must be -1, or 1 and more")
        biases = self.sequence_bias + _biases(self.logit_bias)
        fewest = self.min_tokens if self.min_new_tokens is None else self.min_new_tokens
        told: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": fewest, "n": self.n or 1}
        return self.options(logprobs, **told, sequence_bias=biases, **more)


def _biases(found: Mapping[str, Any] | None) -> tuple[tuple[tuple[int], float], ...]:
    """Raises MalformedRequestError."""
    if found is None:
        return ()
    if len(found) > _MOST_BIASES:
        raise MalformedRequestError(f"`logit_bias` has {len(found)} tokens, and {_MOST_BIASES} are allowed")
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in found):
        raise MalformedRequestError("`logit_bias` has a key that is no token id; send token ids and numbers")
    return tuple(((int(key),), bias(value, "logit_bias")) for key, value in found.items())


class GeneratedUsage(BaseModel):
    """Tokens read and written. A prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def envelope(kind: str, prefix: str, request: Request) -> dict[str, Any]:
    """What every answer and every event of a stream begins with."""
    return {
        "id": f"{prefix}-{request.id}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": f"serve-app-{__version__}",
    }


async def events(
    start: Mapping[str, Any],
    body: SamplingBody,
    pieces: AsyncIterator[GeneratedPiece],
    choice: Callable[[GeneratedPiece], Mapping[str, Any]],
) -> Events:
    """One event for each piece, then the usage if it is wanted, then `[DONE]`."""
    prompt_tokens = completion_tokens = 0
    async for piece in pieces:
        prompt_tokens = max(prompt_tokens, piece.prompt_tokens)
        completion_tokens += piece.token is not None
        told = {"index": piece.choice, **choice(piece), "finish_reason": piece.finish_reason}
        yield encode({**start, "choices": [told]})
    if body.tells_usage:
        yield encode({**start, "choices": [], "usage": usage(prompt_tokens, completion_tokens)})
    yield b"[DONE]"


def check_top(logprobs: int | None, most: int, name: str) -> None:
    """Raises InvalidInputError."""
    if logprobs is not None and not 0 <= logprobs <= most:
        raise InvalidInputError(f"`{name}`: must be 0 to {most}")

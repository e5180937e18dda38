"""What completions and chats share: options, usage and the reasons for an end."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, Field

from serve_app import __version__
from serve_app.errors import InvalidInputError
from serve_app.ingress.protocols.fields import Body, InferenceBody
from serve_app.ingress.protocols.generation import (
    UNSUPPORTED,
    NewTokens,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    refuse_unsupported,
    sampling,
)
from serve_app.options import GenerationOptions
from serve_app.types import Request


class StreamOptions(Body):
    """What a stream has beside the answer."""

    include_usage: bool | None = Field(None, description="Send the usage in an event of its own, at the end.")


class SamplingBody(InferenceBody):
    """How an answer is made; `temperature` 0 is greedy, left out it is as the model's generation config says."""

    max_tokens: NewTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None
    stop: Stop = ()
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, description=UNSUPPORTED)
    presence_penalty: float | None = Field(None, description=UNSUPPORTED)
    frequency_penalty: float | None = Field(None, description=UNSUPPORTED)
    logit_bias: dict[str, Any] | None = Field(None, description=UNSUPPORTED)
    user: str | None = Field(None, description="Taken for compatibility, and not used.")

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self, max_new_tokens: int | None, logprobs: int | None, echo: bool = False) -> GenerationOptions:
        """Raises InvalidInputError where something is asked for that is not supported."""
        neutral: dict[str, tuple[Any, ...]] = {"n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,)}
        refuse_unsupported(self, {**neutral, "logit_bias": ({},)})
        chosen = sampling(None, self.temperature, self.top_k, self.top_p)
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            do_sample=chosen.do_sample,
            temperature=chosen.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            logprobs=logprobs,
            echo=echo,
        )


class GeneratedUsage(BaseModel):
    """Tokens read and written."""

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


def check_top(logprobs: int | None, most: int, name: str) -> None:
    """Raises InvalidInputError."""
    if logprobs is not None and not 0 <= logprobs <= most:
        raise InvalidInputError(f"`{name}` must be 0 to {most}")

"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, cast

from pydantic import BaseModel, Field

from serve_app.errors import InvalidInputError
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Streaming
from serve_app.ingress.protocols.fields import Inputs, documented
from serve_app.ingress.protocols.generation import refuse_unsupported
from serve_app.ingress.protocols.openai.dialect import DIALECT
from serve_app.ingress.protocols.openai.generated import GeneratedUsage, SamplingBody, check_top, envelope, usage
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.ingress.streaming import Events
from serve_app.outputs import Generated, GeneratedPiece, TokenLogprob
from serve_app.types import Answer, Request

_MOST_LOGPROBS = 5
_NEW_TOKENS = 16
"""OpenAI's default."""


class CompletionBody(SamplingBody):
    """Texts, or their token ids, to go on with."""

    model_config = documented(prompt="Once upon a time", max_tokens=20, temperature=0)

    prompt: Inputs
    logprobs: int | None = Field(
        None, description="Log probabilities of so many likely tokens at each place of the answer: 0 to 5."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer. Not with `logprobs`.")
    best_of: int | None = Field(None, description="Not supported but for 1.")
    suffix: str | None = Field(None, description="Not supported but for an empty text.")

    def to_request(self, request_id: str, model: str) -> Request:
        refuse_unsupported(self, {"best_of": (1,), "suffix": ("",)})
        check_top(self.logprobs, _MOST_LOGPROBS, "logprobs")
        if self.echo and self.logprobs is not None:
            raise InvalidInputError(
                "`echo` with `logprobs`: this server tells no log probabilities of prompts; leave one of them out"
            )
        options = self.options(self.max_tokens or _NEW_TOKENS, self.logprobs, bool(self.echo))
        return Request(request_id, model, "text-generation", self.prompt, options)


class CompletionLogprobs(BaseModel):
    """Tokens, their log probabilities, and the most likely ones at their places."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """The answer to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The prompts' answers, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: GeneratedUsage


def write_completion(body: CompletionBody, request: Request, answer: Answer) -> bytes:
    texts = cast("Sequence[Generated]", answer.output)
    choices = [_choice(index, each, body.logprobs) for index, each in enumerate(texts)]
    counted = usage(answer.tokens, sum(len(each.tokens) for each in texts))
    return encode({**envelope("text_completion", "cmpl", request), "choices": choices, "usage": counted})


def _choice(index: int, generated: Generated, top: int | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": generated.text,
        "logprobs": None if top is None else _logprobs(generated.logprobs, top, 0),
        "finish_reason": generated.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob], top: int, offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{each.text: each.logprob for each in token.top} for token in tokens] if top else None,
        "text_offset": offsets,
    }


async def stream_completion(body: CompletionBody, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
    """One event for each piece, then the usage if it is wanted, then `[DONE]`."""
    start = envelope("text_completion", "cmpl", request)
    prompt_tokens = completion_tokens = characters = 0
    async for piece in pieces:
        prompt_tokens = max(prompt_tokens, piece.prompt_tokens)
        completion_tokens += piece.token is not None
        told = None
        if body.logprobs is not None and piece.logprob is not None:
            told = _logprobs([piece.logprob], body.logprobs, characters)
        characters += len(piece.text)
        choice = {"index": 0, "text": piece.text, "logprobs": told, "finish_reason": piece.finish_reason}
        yield encode({**start, "choices": [choice]})
    if body.tells_usage:
        yield encode({**start, "choices": [], "usage": usage(prompt_tokens, completion_tokens)})
    yield b"[DONE]"


def routes() -> tuple[Route, ...]:
    endpoint: Streaming[CompletionBody] = Streaming(CompletionBody, write_completion, stream_completion, DIALECT)
    return tuple(
        Route(
            "POST",
            f"{place}/v1/completions",
            endpoint,
            DIALECT,
            "Go on with texts",
            answer=Completion,
            body=CompletionBody,
            failures=COMPUTE_FAILURES,
            streams=True,
        )
        for place in ANY_MODEL
    )

"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, Field

from serve_app.errors import InvalidInputError
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Streaming
from serve_app.ingress.protocols.fields import Inputs, documented
from serve_app.ingress.protocols.openai.dialect import dialect_of
from serve_app.ingress.protocols.openai.generated import (
    GeneratedUsage,
    SamplingBody,
    check_top,
    envelope,
    events,
    usage,
)
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.ingress.streaming import Events
from serve_app.outputs import Generated, GeneratedPiece, TokenLogprob
from serve_app.types import Answer, Request

_MOST_LOGPROBS = 5
DIALECT = dialect_of("prompt")
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
    best_of: int | None = Field(None, description="Not supported but for 1, or as many as `n`.")

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"add_special_tokens": (True,)}

    def to_request(self, request_id: str, model: str) -> Request:
        check_top(self.logprobs, _MOST_LOGPROBS, "logprobs")
        if self.best_of not in (None, 1, self.n):
            raise InvalidInputError("`best_of`: this server makes as many answers as `n` says; leave it out")
        echo = bool(self.echo or self.return_full_text)
        if echo and self.logprobs is not None:
            raise InvalidInputError(
                "`echo` with `logprobs`: this server tells no log probabilities of prompts; leave one of them out"
            )
        most = self.max_tokens or self.max_new_tokens
        if most is None and self.max_length is None:
            most = _NEW_TOKENS
        return self.request(
            request_id, model, "text-generation", self.prompt, self.chosen(most, self.logprobs, echo=echo)
        )


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
    """The choices of the first prompt, then those of the second, and so on, as OpenAI counts them."""
    texts = cast("Sequence[Generated]", answer.output)
    choices = [_choice(index, each, body.logprobs) for index, each in enumerate(texts)]
    counted = usage(answer.tokens, sum(len(each.tokens) for each in texts))
    return encode({**envelope("text_completion", "cmpl", request), "choices": choices, "usage": counted})


def _choice(index: int, generated: Generated, top: int | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": generated.text,
        "logprobs": None if top is None else _logprobs(generated.logprobs, top, generated.offsets),
        "finish_reason": generated.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob], top: int, offsets: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_likeliest(token) for token in tokens] if top else None,
        "text_offset": list(offsets),
    }


def _likeliest(token: TokenLogprob) -> dict[str, float]:
    """By text, and the chosen one with them. Of several tokens with one text it is the likeliest, which comes first."""
    found: dict[str, float] = {}
    for each in (*token.top, token):
        found.setdefault(each.text, each.logprob)
    return found


def stream_completion(body: CompletionBody, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
    sent: dict[int, int] = {}
    """Characters of each choice."""

    def choice(piece: GeneratedPiece) -> dict[str, Any]:
        offset = sent.get(piece.choice, 0)
        sent[piece.choice] = offset + len(piece.text)
        told = None
        if body.logprobs is not None and piece.logprob is not None:
            told = _logprobs([piece.logprob], body.logprobs, [offset])
        return {"text": piece.text, "logprobs": told}

    return events(envelope("text_completion", "cmpl", request), body, pieces, choice)


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

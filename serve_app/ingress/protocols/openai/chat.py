"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field

from serve_app.errors import InvalidInputError
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Streaming
from serve_app.ingress.protocols.fields import Body, documented
from serve_app.ingress.protocols.generation import MOST_LOGPROBS, NewTokens, refuse_unsupported
from serve_app.ingress.protocols.openai.dialect import DIALECT
from serve_app.ingress.protocols.openai.generated import GeneratedUsage, SamplingBody, check_top, envelope, usage
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.ingress.streaming import Events
from serve_app.outputs import Generated, GeneratedPiece, TokenLogprob
from serve_app.types import Answer, Chat, ChatMessage, Request

_MOST_MESSAGES = 10_000
_MOST_PARTS = 1000
_MOST_TOOLS = 1000


def _nameless(value: object) -> object:
    return None if value == "dummy" else value


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=_MOST_PARTS, fail_fast=True)]

    def turn(self) -> ChatMessage:
        parts = self.content
        return ChatMessage(self.role, parts if isinstance(parts, str) else "".join(part.text for part in parts))


class ResponseFormat(Body):
    """What the answer has to be."""

    type: str


class ChatBody(SamplingBody):
    """A conversation to go on with."""

    model_config = documented(messages=[{"role": "user", "content": "What is Deep Learning?"}], max_tokens=20)

    model: Annotated[str | None, BeforeValidator(_nameless)] = Field(
        None,
        description="Name of the model. May be left out where the path names it or only one is served; so may `dummy`, "
        "which is what huggingface_hub sends to a URL.",
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: NewTokens = None
    logprobs: bool | None = Field(None, description="Tell each token's log probability.")
    top_logprobs: int | None = Field(None, description="And those of so many likely tokens at its place: 0 to 20.")
    response_format: ResponseFormat | None = Field(None, description="Only text is supported.")
    tools: Annotated[list[Any], Field(max_length=_MOST_TOOLS)] | None = Field(
        None, description="Not supported but for an empty list."
    )

    def to_request(self, request_id: str, model: str) -> Request:
        refuse_unsupported(self, {"tools": ([],)})
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidInputError("`response_format`: this server does not support it but for text; leave it out")
        check_top(self.top_logprobs, MOST_LOGPROBS, "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        options = self.options(self.max_completion_tokens or self.max_tokens, logprobs)
        chat = Chat(tuple(message.turn() for message in self.messages))
        return Request(request_id, model, "text-generation", (chat,), options)


class ChatTopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTopLogprob):
    """A token, and those that were likely at its place."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """The answer's tokens."""

    content: list[ChatLogprob]


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """The answer, and why it ended."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The conversation's next turn."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: GeneratedUsage


def write_chat(body: ChatBody, request: Request, answer: Answer) -> bytes:
    (generated,) = cast("Sequence[Generated]", answer.output)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": generated.text},
        "logprobs": {"content": [_logprob(each) for each in generated.logprobs]} if body.logprobs else None,
        "finish_reason": generated.finish_reason,
    }
    counted = usage(answer.tokens, len(generated.tokens))
    return encode({**envelope("chat.completion", "chatcmpl", request), "choices": [choice], "usage": counted})


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_likely(token), "top_logprobs": [_likely(each) for each in token.top]}


def _likely(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


async def stream_chat(body: ChatBody, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
    """One event for each piece, then the usage if it is wanted, then `[DONE]`."""
    start = envelope("chat.completion.chunk", "chatcmpl", request)
    prompt_tokens = completion_tokens = 0
    async for piece in pieces:
        prompt_tokens = max(prompt_tokens, piece.prompt_tokens)
        completion_tokens += piece.token is not None
        told = {"content": [_logprob(piece.logprob)]} if body.logprobs and piece.logprob is not None else None
        delta = {"role": "assistant", "content": piece.text}
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": piece.finish_reason}
        yield encode({**start, "choices": [choice]})
    if body.tells_usage:
        yield encode({**start, "choices": [], "usage": usage(prompt_tokens, completion_tokens)})
    yield b"[DONE]"


def routes() -> tuple[Route, ...]:
    endpoint: Streaming[ChatBody] = Streaming(ChatBody, write_chat, stream_chat, DIALECT)
    return tuple(
        Route(
            "POST",
            f"{place}/v1/chat/completions",
            endpoint,
            DIALECT,
            "Go on with a conversation",
            answer=ChatCompletion,
            body=ChatBody,
            failures=COMPUTE_FAILURES,
            streams=True,
        )
        for place in ANY_MODEL
    )

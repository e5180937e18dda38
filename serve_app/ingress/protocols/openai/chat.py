"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Streaming
from serve_app.ingress.protocols.fields import Body, any_text, documented, kind
from serve_app.ingress.protocols.generation import MOST_LOGPROBS, UNSUPPORTED, NewTokens, refuse_unsupported
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


_OTHER_PARTS = ("image_url", "input_audio", "audio_url", "video_url", "file", "refusal")
_TEXT_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}


def read_content(value: Any, info: ValidationInfo) -> str | None:
    """A text, or a list of parts that are texts, which are joined; null where there is none.

    Raises MalformedRequestError, or InvalidInputError where a part is not a text.
    """
    if value is None or type(value) is str:
        return value
    if type(value) is not list:
        raise MalformedRequestError(f"`content` is {kind(value)}; send a text or a list of parts")
    if len(value) > _MOST_PARTS:
        raise MalformedRequestError(f"`content` has {len(value)} parts, and {_MOST_PARTS} are allowed")
    return "".join(_part(part, f"content[{index}]") for index, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    if type(part) is not dict:
        raise MalformedRequestError(f"`{where}` is {kind(part)}; send an object of type and text")
    if part.get("type") == "text":
        return any_text(part.get("text"), f"{where}.text")
    told = f"is of type {part['type']}" if part.get("type") in _OTHER_PARTS else "is no text"
    raise InvalidInputError(f"`{where}` {told}; models here read parts of type text only")


Content = Annotated[
    str | None,
    PlainValidator(read_content),
    WithJsonSchema(
        {
            "description": "A text or parts of type text; null in a turn of the assistant's that called a tool.",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {**_TEXT_PART, "required": ["type", "text"]}, "maxItems": _MOST_PARTS},
                {"type": "null"},
            ],
        }
    ),
]


class Message(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None

    def turn(self) -> ChatMessage:
        """Raises MalformedRequestError where another than the assistant says nothing."""
        if self.content is None and self.role != "assistant":
            raise MalformedRequestError("`messages`: a turn has no `content`, which only the assistant's may leave out")
        return ChatMessage(self.role, self.content or "")


class ResponseFormat(Body):
    """What the answer has to be."""

    type: str


class ChatBody(SamplingBody):
    """A conversation to go on with."""

    model_config = documented(messages=[{"role": "user", "content": "What is Deep Learning?"}], max_tokens=20)

    model: Annotated[str | None, BeforeValidator(_nameless)] = Field(
        None,
        description="Name of the model, or one of its aliases. May be left out as for other paths; `dummy`, which is "
        "what huggingface_hub sends to a URL, is as good as none.",
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: NewTokens = None
    logprobs: bool | None = Field(None, description="Tell each token's log probability.")
    top_logprobs: int | None = Field(None, description="And those of so many likely tokens at its place: 0 to 20.")
    response_format: ResponseFormat | None = Field(None, description="Only text is supported.")
    tools: Annotated[list[Any], Field(max_length=_MOST_TOOLS)] | None = Field(
        None, description="Not supported, but for an empty list or `tool_choice` none."
    )
    tool_choice: Any = Field(None, description="Only none and auto are supported.")
    functions: Annotated[list[Any], Field(max_length=_MOST_TOOLS)] | None = Field(
        None, description="Not supported, but for an empty list."
    )
    function_call: Any = Field(None, description="Only none and auto are supported.")
    modalities: Annotated[list[str], Field(max_length=10, fail_fast=True)] | None = Field(
        None, description="Only text is supported."
    )
    audio: dict[str, Any] | None = Field(None, description=UNSUPPORTED)

    def to_request(self, request_id: str, model: str) -> Request:
        self._refuse_tools()
        refuse_unsupported(self, {"modalities": ([], ["text"]), "audio": ()})
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidInputError("`response_format`: this server does not support it but for text; leave it out")
        check_top(self.top_logprobs, MOST_LOGPROBS, "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        options = self.options(self.max_completion_tokens or self.max_tokens, logprobs)
        chat = Chat(tuple(message.turn() for message in self.messages))
        return Request(request_id, model, "text-generation", (chat,), options)

    def _refuse_tools(self) -> None:
        """Raises InvalidInputError; what may not be called may be listed."""
        refuse_unsupported(self, {"tool_choice": ("none", "auto"), "function_call": ("none", "auto")})
        if self.tool_choice != "none":
            refuse_unsupported(self, {"tools": ([],)})
        if self.function_call != "none":
            refuse_unsupported(self, {"functions": ([],)})


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

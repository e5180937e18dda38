"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import from_json

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Streaming
from serve_app.ingress.protocols.fields import Body, documented, kind, text
from serve_app.ingress.protocols.generation import MOST_LOGPROBS, NewTokens
from serve_app.ingress.protocols.openai.dialect import dialect_of
from serve_app.ingress.protocols.openai.generated import (
    GeneratedUsage,
    SamplingBody,
    check_top,
    envelope,
    events,
    usage,
)
from serve_app.ingress.protocols.unknown import refuse
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.ingress.streaming import Events
from serve_app.outputs import Generated, GeneratedPiece, TokenLogprob
from serve_app.types import Answer, Chat, ChatMessage, Request

DIALECT = dialect_of("messages")

_MOST_MESSAGES = 10_000
_MOST_PARTS = 1000
_MOST_TOOLS = 1000
_MOST_NAME = 1000
_MOST_VARIABLES = 100


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
        return text(part.get("text"), f"{where}.text")
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


class FunctionCall(Body):
    """A function, and what it was called with: JSON as a text, as models write it, or as it is."""

    name: Annotated[str, Field(max_length=_MOST_NAME)]
    arguments: str | dict[str, Any] | None = None

    def told(self) -> dict[str, Any]:
        """With the arguments as an object, which is what templates expect. Raises MalformedRequestError."""
        arguments = self.arguments
        if isinstance(arguments, str):
            try:
                arguments = from_json(arguments) if arguments else {}
            except ValueError:
                raise MalformedRequestError("`messages.tool_calls.function.arguments`: is no JSON") from None
        return {"name": self.name, "arguments": {} if arguments is None else arguments}


class ToolCall(Body):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def told(self) -> dict[str, Any]:
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": self.type, "function": self.function.told()}


class Message(Body):
    """One turn of the conversation. The model's chat template has all of it, and says what the model reads."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Annotated[str, Field(max_length=_MOST_NAME)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=_MOST_NAME)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def turn(self) -> ChatMessage:
        """Raises MalformedRequestError where another than the assistant says nothing."""
        if self.content is None and self.role != "assistant":
            raise MalformedRequestError("`messages`: a turn has no `content`, which only the assistant's may leave out")
        told: dict[str, Any] = {name: getattr(self, name) for name in _OTHER_FIELDS if getattr(self, name) is not None}
        if self.tool_calls:
            told["tool_calls"] = [call.told() for call in self.tool_calls]
        return ChatMessage(self.role, self.content or "", told)


_OTHER_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning")


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
    add_generation_prompt: bool | None = Field(
        None, description="Begin a turn of the assistant's; true unless the final message is continued."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Go on with the final message instead. Where neither this nor `add_generation_prompt` is given, a "
        "final message of the assistant's is continued, as by transformers' pipeline.",
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=_MOST_VARIABLES)] | None = Field(
        None,
        description="Variables of the model's chat template, such as `enable_thinking`; refused where it has no such.",
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="A variable of the chat template, too; refused where the template has none."
    )
    documents: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS, fail_fast=True)] | None = Field(
        None, description="Documents for chat templates that read them, each usually of a title and a text."
    )
    tools: Annotated[list[Any], Field(max_length=_MOST_TOOLS)] | None = Field(
        None, description="Not supported, but for an empty list or `tool_choice` none."
    )
    tool_choice: Any = Field(None, description="Only none and auto are supported.")
    functions: Annotated[list[Any], Field(max_length=_MOST_TOOLS)] | None = Field(
        None, description="Not supported, but for an empty list."
    )
    function_call: Any = Field(None, description="Only none and auto are supported.")

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"add_special_tokens": (False,)}

    def to_request(self, request_id: str, model: str) -> Request:
        self._refuse_tools()
        if self.return_full_text:
            raise InvalidInputError("`return_full_text`: a conversation is not repeated; leave it out")
        check_top(self.top_logprobs, MOST_LOGPROBS, "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        options = self.chosen(self.max_completion_tokens or self.max_tokens or self.max_new_tokens, logprobs)
        return self.request(request_id, model, "text-generation", (self._chat(),), options)

    def _chat(self) -> Chat:
        """Raises MalformedRequestError."""
        messages, begins = tuple(message.turn() for message in self.messages), self.add_generation_prompt
        if begins and self.continue_final_message:
            raise MalformedRequestError(
                "`continue_final_message` and `add_generation_prompt` are both true; an answer is either in the final "
                "message or in a turn of its own"
            )
        last = messages[-1]
        says_nothing = self.continue_final_message is None and begins is None
        continues = last.role == "assistant" and bool(last.content) if says_nothing else self.continue_final_message
        variables = {"documents": self.documents, "reasoning_effort": self.reasoning_effort}
        named = {name: value for name, value in variables.items() if value is not None}
        return Chat(
            messages,
            continues=bool(continues),
            begins_turn=not continues if begins is None else begins,
            variables={**named, **(self.chat_template_kwargs or {})},
        )

    def _refuse_tools(self) -> None:
        """Raises InvalidInputError; what may not be called may be listed."""
        chosen = {"tool_choice": self.tool_choice, "function_call": self.function_call}
        refuse(chosen, _WITHOUT_TOOLS)
        if self.tool_choice != "none":
            refuse({"tools": self.tools}, _WITHOUT_TOOLS)
        if self.function_call != "none":
            refuse({"functions": self.functions}, _WITHOUT_TOOLS)


_WITHOUT_TOOLS = ChatBody.model_fields.keys() - {"tools", "tool_choice", "functions", "function_call"}


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
    answers = cast("Sequence[Generated]", answer.output)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": generated.text},
            "logprobs": {"content": [_logprob(each) for each in generated.logprobs]} if body.logprobs else None,
            "finish_reason": generated.finish_reason,
        }
        for index, generated in enumerate(answers)
    ]
    counted = usage(answer.tokens, sum(len(generated.tokens) for generated in answers))
    return encode({**envelope("chat.completion", "chatcmpl", request), "choices": choices, "usage": counted})


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_likely(token), "top_logprobs": [_likely(each) for each in token.top]}


def _likely(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.own_bytes)}


def stream_chat(body: ChatBody, request: Request, pieces: AsyncIterator[GeneratedPiece]) -> Events:
    def choice(piece: GeneratedPiece) -> dict[str, Any]:
        told = {"content": [_logprob(piece.logprob)]} if body.logprobs and piece.logprob is not None else None
        return {"delta": {"role": "assistant", "content": piece.text}, "logprobs": told}

    return events(envelope("chat.completion.chunk", "chatcmpl", request), body, pieces, choice)


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

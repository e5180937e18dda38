"""OpenAI's completions and chats, and the rerank of Cohere and Jina."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serve_app.options import GenerationOptions
from serve_app.types import Chat, ChatMessage
from tests.ingress.edge import FakeService

HELLO = [{"role": "user", "content": "hello"}]


async def post(client: httpx.AsyncClient, path: str, body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def events(client: httpx.AsyncClient, path: str, body: Any) -> list[Any]:
    """The events of a stream, which ends with `[DONE]`."""
    response = await client.post(path, json={**body, "stream": True})
    *lines, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_completion_has_a_choice_for_each_prompt(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = await post(client, "/v1/completions", {"prompt": ["a", [5, 6]], "max_tokens": 4, "temperature": 0})
    assert answer["object"] == "text_completion"
    assert [(c["index"], c["text"], c["finish_reason"]) for c in answer["choices"]] == [
        (0, "Once upon a time", "length"),
        (1, "Once upon a time", "length"),
    ]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert service.requests[0].inputs == ("a", (5, 6))
    assert service.requests[0].options == GenerationOptions(max_new_tokens=4, do_sample=False)


async def test_a_completion_has_16_tokens_unless_told_otherwise(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    await post(client, "/v1/completions", {"prompt": "a"})
    assert service.requests[0].options == GenerationOptions(max_new_tokens=16)


async def test_sampling_is_as_the_client_says(client: httpx.AsyncClient, service: FakeService) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "\n", "echo": True, "max_tokens": 1}
    await post(client, "/v1/completions", {"prompt": "a", **sampling})
    assert service.requests[0].options == GenerationOptions(
        max_new_tokens=1, do_sample=True, temperature=0.5, top_p=0.9, seed=3, stop=("\n",), echo=True
    )


async def test_a_completion_tells_log_probabilities(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/completions", {"prompt": "a", "logprobs": 1})
    told = answer["choices"][0]["logprobs"]
    assert told["tokens"] == ["Once", " upon", " a", " time"]
    assert told["token_logprobs"][1] == -0.5
    assert told["top_logprobs"][0] == {"x": -0.25}
    assert told["text_offset"] == [0, 4, 9, 11]


async def test_a_completion_in_pieces(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "stream_options": {"include_usage": True}}
    *pieces, usage = await events(client, "/v1/completions", body)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "Once upon a time"
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-2:] == [None, "stop"]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}


async def test_a_chat_is_one_input_with_every_turn(client: httpx.AsyncClient, service: FakeService) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = await post(client, "/v1/chat/completions", {"messages": messages, "max_completion_tokens": 3})
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Once upon a time"}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] is None
    request = service.requests[0]
    assert request.task == "text-generation"
    assert request.inputs == (Chat((ChatMessage("system", "Be brief."), ChatMessage("user", "hello"))),)
    assert request.options == GenerationOptions(max_new_tokens=3)


async def test_a_chat_tells_log_probabilities(client: httpx.AsyncClient) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1}
    first = (await post(client, "/v1/chat/completions", body))["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"]) == ("Once", list(b"Once"))
    assert first["top_logprobs"] == [{"token": "x", "logprob": -0.25, "bytes": list(b"x")}]


async def test_a_chat_in_pieces(client: httpx.AsyncClient) -> None:
    pieces = await events(client, "/v1/chat/completions", {"messages": HELLO})
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == "Once upon a time"
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in pieces}) == 1
    assert "usage" not in pieces[-1]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "n", 2),
        ("/v1/completions", "best_of", 2),
        ("/v1/completions", "suffix", "x"),
        ("/v1/completions", "logprobs", 6),
        ("/v1/completions", "presence_penalty", 0.5),
        ("/v1/chat/completions", "n", 2),
        ("/v1/chat/completions", "top_logprobs", 21),
        ("/v1/chat/completions", "tools", [{"type": "function"}]),
        ("/v1/chat/completions", "response_format", {"type": "json_object"}),
        ("/v1/chat/completions", "logit_bias", {"1": 5}),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, path: str, field: str, value: Any
) -> None:
    response = await client.post(path, json={"prompt": "a", "messages": HELLO, field: value})
    assert response.status_code == 422
    assert field in response.json()["error"]["message"]
    assert service.requests == []


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": HELLO, "temperature": -1},
        {"messages": HELLO, "top_p": 0},
        {"messages": HELLO, "max_tokens": 0},
        {"messages": HELLO, "stop": [""]},
        {"messages": HELLO, "stop": ["a"] * 17},
        {"messages": HELLO, "seed": -1},
        {"messages": [{"role": "nobody", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": ["a"]}]},
    ],
)
async def test_options_out_of_range_are_refused(client: httpx.AsyncClient, body: Any) -> None:
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 400


async def test_a_turn_of_the_assistants_may_have_no_content(client: httpx.AsyncClient, service: FakeService) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    await post(client, "/v1/chat/completions", {"messages": [*HELLO, called, {"role": "tool", "content": "42"}]})
    (chat,) = service.requests[0].inputs
    assert isinstance(chat, Chat)
    assert [(turn.role, turn.content) for turn in chat.messages[1:]] == [("assistant", ""), ("tool", "42")]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "a-kind-that-must-not-come-back"])
async def test_parts_that_are_no_text_are_refused_by_their_type(client: httpx.AsyncClient, kind: str) -> None:
    content = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    response = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 422
    assert (kind in response.text) == ("must-not" not in kind)
    assert "content[1]" in response.json()["error"]["message"]


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", TOOLS),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("tool_choice", "required"),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
    ],
)
async def test_what_a_chat_cannot_do_here_is_refused_by_name(client: httpx.AsyncClient, field: str, value: Any) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, field: value})
    assert response.status_code == 422
    assert f"`{field}`" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS, "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
    ],
)
async def test_what_changes_nothing_passes(client: httpx.AsyncClient, fields: Any) -> None:
    await post(client, "/v1/chat/completions", {"messages": HELLO, **fields})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompts_log_probabilities_are_refused(client: httpx.AsyncClient, stream: bool) -> None:
    body = {"prompt": "a", "echo": True, "logprobs": 0, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 422
    assert "`echo` with `logprobs`" in response.json()["error"]["message"]


async def test_documents_are_put_in_order(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {"query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2, "return_documents": True}
    answer = await post(client, "/v1/rerank", body)
    assert answer["results"] == [
        {"index": 2, "relevance_score": 0.25, "document": {"text": "c"}},
        {"index": 1, "relevance_score": 0.125, "document": {"text": "b"}},
    ]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"]
    assert service.requests[0].inputs == ("q", "a", "b", "c")

"""OpenAI's completions and chats, and the rerank of Cohere and Jina."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serve_app.errors import InputTooLongError
from serve_app.options import GenerationOptions
from serve_app.outputs import Generated, TokenLogprob
from serve_app.types import Chat, ChatMessage
from tests.ingress.edge import FakeService, client_of

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
    assert told["top_logprobs"][0] == {"x": -0.25, "Once": 0.0}
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
        ("/v1/completions", "best_of", 2),
        ("/v1/completions", "suffix", "x"),
        ("/v1/completions", "logprobs", 6),
        ("/v1/completions", "presence_penalty", 0.5),
        ("/v1/chat/completions", "top_logprobs", 21),
        ("/v1/chat/completions", "tools", [{"type": "function"}]),
        ("/v1/chat/completions", "response_format", {"type": "json_object"}),
        ("/v1/chat/completions", "guided_json", {"type": "object"}),
        ("/v1/chat/completions", "prompt_logprobs", 1),
        ("/v1/chat/completions", "allowed_token_ids", [1]),
        ("/v1/chat/completions", "bad_words", ["x"]),
        ("/v1/chat/completions", "chat_template", "{{ 1 }}"),
        ("/v1/chat/completions", "include_stop_str_in_output", True),
        ("/v1/chat/completions", "max_new_token", 5),
        ("/v1/completions", "use_beam_search", True),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, path: str, field: str, value: Any
) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    response = await client.post(path, json={**asked, field: value})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["type"]) == (field, "invalid_request_error")
    assert f"`{field}`" in error["message"]
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
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    await post(client, "/v1/chat/completions", {"messages": [*HELLO, called, {"role": "tool", "content": "42"}]})
    (chat,) = service.requests[0].inputs
    assert isinstance(chat, Chat)
    assert [(turn.role, turn.content) for turn in chat.messages[1:]] == [("assistant", ""), ("tool", "42")]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "a-kind-that-must-not-come-back"])
async def test_parts_that_are_no_text_are_refused_by_their_type(client: httpx.AsyncClient, kind: str) -> None:
    content = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    response = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400
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
    assert response.status_code == 400
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


async def chat_of(client: httpx.AsyncClient, service: FakeService, body: Any) -> Chat:
    await post(client, "/v1/chat/completions", body)
    (chat,) = service.requests[-1].inputs
    assert isinstance(chat, Chat)
    return chat


BEGUN = [*HELLO, {"role": "assistant", "content": "Hel"}]


@pytest.mark.parametrize(
    ("messages", "asked", "continues", "begins"),
    [
        (HELLO, {}, False, True),
        (BEGUN, {}, True, False),
        (BEGUN, {"add_generation_prompt": True}, False, True),
        (BEGUN, {"add_generation_prompt": False}, False, False),
        (BEGUN, {"continue_final_message": False}, False, True),
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": False}, True, False),
        (HELLO, {"continue_final_message": True}, True, False),
        (HELLO, {"add_generation_prompt": False}, False, False),
        ([*HELLO, {"role": "assistant", "tool_calls": [CALL]}], {}, False, True),
    ],
)
async def test_a_final_message_of_the_assistants_is_continued_unless_told_otherwise(
    client: httpx.AsyncClient, service: FakeService, messages: Any, asked: Any, continues: bool, begins: bool
) -> None:
    chat = await chat_of(client, service, {"messages": messages, **asked})
    assert (chat.continues, chat.begins_turn) == (continues, begins)


async def test_an_answer_is_not_in_the_final_message_and_in_a_turn_of_its_own(client: httpx.AsyncClient) -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}
    response = await client.post("/v1/chat/completions", json={"messages": BEGUN, **both})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "continue_final_message"


async def test_a_template_gets_all_that_a_turn_says(client: httpx.AsyncClient, service: FakeService) -> None:
    """Arguments of a call are an object for it, as transformers' documentation of tool use has them."""
    called = {"role": "assistant", "reasoning_content": "hm", "tool_calls": [CALL], "refusal": None, "annotations": []}
    answered = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    chat = await chat_of(client, service, {"messages": [*HELLO, called, answered]})
    assert chat.messages[1].fields == {
        "reasoning_content": "hm",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    assert chat.messages[2].fields == {"tool_call_id": "1", "name": "add"}
    assert len(chat) > len("hello") + len("hm")


async def test_a_template_gets_its_variables(client: httpx.AsyncClient, service: FakeService) -> None:
    variables = {"enable_thinking": False, "depth": 3}
    documents = [{"title": "a", "text": "b"}]
    body = {"messages": HELLO, "chat_template_kwargs": variables, "reasoning_effort": "low", "documents": documents}
    chat = await chat_of(client, service, body)
    assert chat.variables == {**variables, "reasoning_effort": "low", "documents": documents}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "", "function_call": {"name": "f"}},
        {"role": "assistant", "content": "", "prefix": True},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]},
    ],
)
async def test_what_a_turn_cannot_say_here_is_refused(client: httpx.AsyncClient, message: Any) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [*HELLO, message]})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")


async def test_all_that_generate_can_do_is_taken_by_every_route(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    vllms = {
        "min_tokens": 2,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "min_p": 0.1,
        "top_k": -1,
        "logit_bias": {"5": -100},
    }
    await post(client, "/v1/completions", {"prompt": "a", **vllms, "stop_strings": "x", "stop": "y", "num_beams": 1})
    assert service.requests[-1].options == GenerationOptions(
        max_new_tokens=16,
        min_new_tokens=2,
        do_sample=True,
        top_k=0,
        min_p=0.1,
        num_beams=1,
        stop=("y", "x"),
        stop_token_ids=(7,),
        ignore_eos=True,
        sequence_bias=(((5,), -100.0),),
    )
    chosen = {
        "suppress_tokens": [1],
        "begin_suppress_tokens": [2],
        "bad_words_ids": [[3], [4, 5]],
        "sequence_bias": [[[6, 7], 1.5]],
        "typical_p": 0.5,
    }
    await post(client, "/v1/chat/completions", {"messages": HELLO, **chosen})
    wanted = GenerationOptions(
        do_sample=True,
        typical_p=0.5,
        suppress_tokens=(1,),
        begin_suppress_tokens=(2,),
        bad_words_ids=((3,), (4, 5)),
        sequence_bias=(((6, 7), 1.5),),
    )
    assert service.requests[-1].options == wanted
    async with client_of(FakeService(task="text-generation")) as other:
        response = await other.post("/", json={"inputs": "a", "parameters": chosen})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": "2"}},
        {"stop_token_ids": [-1]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [1]},
        {"sequence_bias": [[[1]]]},
        {"sequence_bias": [[[1], 1e9]]},
        {"suppress_tokens": 5},
        {"suppress_tokens": [True]},
        {"n": 0},
        {"n": 129},
        {"truncate_prompt_tokens": 0},
    ],
    ids=repr,
)
async def test_odd_values_name_their_field(client: httpx.AsyncClient, asked: Any) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", **asked})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(next(iter(asked)))


async def test_several_answers_have_an_index_each(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = await post(client, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "best_of": 2})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16
    assert service.requests[-1].options == GenerationOptions(max_new_tokens=16, n=2)
    answer = await post(client, "/v1/chat/completions", {"messages": HELLO, "n": 3})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    pieces = await events(client, "/v1/chat/completions", {"messages": HELLO, "n": 2})
    told = {0: "", 1: ""}
    for piece in pieces:
        told[piece["choices"][0]["index"]] += piece["choices"][0]["delta"]["content"]
    assert told == dict.fromkeys((0, 1), "Once upon a time")
    pieces = await events(client, "/v1/completions", {"prompt": "a", "n": 2, "logprobs": 0})
    offsets = [p["choices"][0]["logprobs"]["text_offset"] for p in pieces if p["choices"][0]["logprobs"]]
    assert offsets == [[0], [0], [4], [4], [9], [9], [11], [11]]


async def test_answers_count_as_inputs_do(service: FakeService) -> None:
    async with client_of(service, max_client_batch_size=4) as client:
        response = await client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 3})
    assert response.status_code == 400
    assert "6 answers" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "long_texts", "side", "tokens"),
    [
        ({}, None, None, None),
        ({"truncate": True}, "truncate", None, None),
        ({"long_texts": "error"}, "error", None, None),
        ({"truncate": 9}, "truncate", "left", 9),
        ({"truncate_prompt_tokens": 9}, "truncate", "left", 9),
        ({"truncate_prompt_tokens": -1, "truncation_direction": "right"}, "truncate", "right", None),
    ],
)
async def test_a_request_may_ask_for_a_cut(
    client: httpx.AsyncClient, service: FakeService, asked: Any, long_texts: Any, side: Any, tokens: Any
) -> None:
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HELLO})):
        await post(client, path, {**body, **asked})
        request = service.requests[-1]
        assert isinstance(request.options, GenerationOptions)
        assert (request.long_texts, request.truncation_side) == (long_texts, side)
        assert request.options.prompt_tokens == tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a"]}, "prompt[0]"),
        ("/v1/chat/completions", {"messages": HELLO}, "messages[0]"),
        ("/v1/embeddings", {"input": "a"}, "input[0]"),
        ("/v1/rerank", {"query": "q", "documents": ["a"]}, "documents[0]"),
    ],
)
async def test_what_is_too_long_has_openais_code(
    client: httpx.AsyncClient, service: FakeService, path: str, body: Any, param: str
) -> None:
    service.failure = InputTooLongError("inputs[0]: 700 tokens, and the model takes 512; shorten it")
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_half_a_character_has_its_own_bytes_and_several_tokens_may_share_a_text(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    likely = (TokenLogprob(7, "\ufffd", -1.0, part=b"\xe2"), TokenLogprob(8, "\ufffd", -2.0, part=b"\xf0"))
    token = TokenLogprob(9, "x", -3.0, likely)
    answer = (Generated("x", (9,), "length", (token,), (0,)),)
    monkeypatch.setattr("tests.ingress.edge.made_up", lambda request: answer)
    told = (await post(client, "/v1/completions", {"prompt": "a", "logprobs": 2}))["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{"\ufffd": -1.0, "x": -3.0}]
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    told = (await post(client, "/v1/chat/completions", body))["choices"][0]["logprobs"]["content"][0]
    assert [each["bytes"] for each in told["top_logprobs"]] == [[0xE2], [0xF0]]


async def test_token_ids_can_be_refused(service: FakeService) -> None:
    async with client_of(service, accept_token_ids=False) as client:
        assert (await client.post("/v1/embeddings", json={"input": ["a"]})).status_code == 200
        for path, body in (("/v1/embeddings", {"input": ["a", [5, 6]]}), ("/v1/completions", {"prompt": [5, 6]})):
            response = await client.post(path, json=body)
            error = response.json()["error"]
            assert response.status_code == 400
            assert "token ids are not taken here" in error["message"]
            assert error["param"] in ("input[1]", "prompt[0]")
        assert (await client.post("/embed", json={"inputs": [5, 6]})).status_code == 422


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompts_log_probabilities_are_refused(client: httpx.AsyncClient, stream: bool) -> None:
    body = {"prompt": "a", "echo": True, "logprobs": 0, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 400
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

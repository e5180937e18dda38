"""The openai package's completions and chats, sync and async."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serve_app import errors
from tests.ingress.edge import FakeService, edge_app, served_in_thread

SERVICE = FakeService(task="text-generation")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_in_thread(edge_app(SERVICE)) as base:
        yield f"{base}/v1"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="not needed", max_retries=0, timeout=60)


def test_a_completion_whole_and_in_pieces(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="a", max_tokens=5, logprobs=1, stop=["."], seed=1)
    pieces = client.completions.create(model="tiny", prompt="a", stream=True)
    assert whole.choices[0].text == "".join(piece.choices[0].text for piece in pieces) == "Once upon a time"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.tokens == ["Once", " upon", " a", " time"]


def test_a_chat_whole_and_in_pieces(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], temperature=0.5, logprobs=True, top_logprobs=1
    )
    pieces = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert chat.choices[0].message.content == streamed == "Once upon a time"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 4
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.prompt_tokens == 6


def test_several_answers_and_an_answer_sent_back(client: openai.OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="tiny", messages=asked, n=2, store=False, user="me")
    assert [choice.index for choice in chat.choices] == [0, 1]
    again = client.chat.completions.create(
        model="tiny",
        messages=[*asked, chat.choices[0].message.model_dump(), {"role": "user", "content": "and?"}],
        extra_body={"chat_template_kwargs": {"enable_thinking": False}, "min_p": 0.1},
    )
    assert again.choices[0].message.content
    pieces = client.completions.create(model="tiny", prompt="a", n=2, stream=True)
    assert {piece.choices[0].index for piece in pieces} == {0, 1}
    with pytest.raises(openai.BadRequestError, match="is not supported here") as caught:
        client.chat.completions.create(model="tiny", messages=asked, presence_penalty=0.5)
    assert caught.value.param == "presence_penalty"


def test_errors_before_and_midway_are_the_clients_own(client: openai.OpenAI) -> None:
    SERVICE.failure = errors.OverloadedError("full")
    try:
        with pytest.raises(openai.RateLimitError, match="full"):
            client.completions.create(model="tiny", prompt="a", stream=True)
        SERVICE.failure, SERVICE.pieces_before_failure = errors.UnavailableError("a replica was lost"), 1
        with pytest.raises(openai.APIError, match="a replica was lost"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))
    finally:
        SERVICE.failure, SERVICE.pieces_before_failure = None, 0


async def test_the_async_client_gets_the_same(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="not needed", max_retries=0, timeout=60) as client:
        pieces = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        text = "".join([piece.choices[0].delta.content or "" async for piece in pieces])
    assert text == "Once upon a time"

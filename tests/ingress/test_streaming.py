"""Answers in pieces: when headers go, how errors are told, and what becomes of work whose client left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from serve_app import errors
from serve_app.ingress.front import Front
from tests.ingress import edge
from tests.ingress.edge import WORDS, FakeService, client_of, edge_app, served

STREAMS = {
    "/v1/completions": {"prompt": "a", "stream": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "stream": True},
    "/": {"inputs": "a", "stream": True},
}


@pytest.fixture
def service() -> FakeService:
    return FakeService(task="text-generation")


def events(text: str) -> list[Any]:
    """The data of every event, JSON read, `[DONE]` as it stands."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_is_of_events_that_nobody_holds_back(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json=STREAMS[path])
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"]
    assert "content-length" not in response.headers
    assert len(events(response.text)) >= len(WORDS) + 1


@pytest.mark.parametrize("wrap", [lambda app: app, Front], ids=["alone", "as behind Serve"])
@pytest.mark.parametrize("path", STREAMS)
async def test_a_client_of_http_1_0_gets_a_stream_piece_by_piece_until_it_is_closed(
    service: FakeService, path: str, wrap: Callable[[ASGIApp], ASGIApp]
) -> None:
    """It knows no chunks."""
    service.go.clear()
    body = json.dumps(STREAMS[path]).encode()
    async with served(wrap(edge_app(service))) as address:
        reader, writer = await asyncio.open_connection(*address)
        head = f"POST {path} HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answered = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).lower()
        first = await asyncio.wait_for(reader.readuntil(b"\n\n"), 20)
        service.go.set()
        rest = await asyncio.wait_for(reader.read(), 20)
        writer.close()
    assert b"transfer-encoding" not in answered
    assert b"content-length" not in answered
    assert b"connection: close" in answered
    text = "".join(str(each) for each in told(events((first + rest).decode())))
    assert all(word in text for word in WORDS)


async def test_a_client_of_http_1_0_gets_a_whole_answer_with_its_length(service: FakeService) -> None:
    async with served(Front(edge_app(service))) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b'POST /v1/completions HTTP/1.0\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}')
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head.lower()
    assert json.loads(body)["choices"][0]["text"] == "".join(WORDS)


@pytest.mark.parametrize("path", STREAMS)
async def test_a_line_end_that_only_unicode_knows_splits_no_event(
    client: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("a\u2028", "b\u2029", "c\x85", "d\r\n\x0b\x0c\x1c\x1d\x1e")
    monkeypatch.setattr(edge, "WORDS", words)
    text = (await client.post(path, json=STREAMS[path])).text
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert len(lines) == len(events(text))
    assert all(word in "".join(map(str, told(events(text)))) for word in words)


def told(found: Any) -> list[str]:
    """Every text in the events."""
    if isinstance(found, dict):
        return [text for value in found.values() for text in told(value)]
    return [text for value in found for text in told(value)] if isinstance(found, list) else [str(found)]


@pytest.mark.parametrize("path", STREAMS)
async def test_an_error_before_the_first_piece_is_answered_as_any_other(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    service.failure = errors.OverloadedError("the queue is full", retry_after_s=3)
    response = await client.post(path, json=STREAMS[path])
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(
    ("failure", "message"),
    [(errors.UnavailableError("a replica was lost"), "a replica was lost"), (ZeroDivisionError("inner"), "unexpected")],
    ids=["ours", "unexpected"],
)
async def test_an_error_midway_is_an_event_and_the_last_one(
    client: httpx.AsyncClient, service: FakeService, path: str, failure: Exception, message: str
) -> None:
    service.failure, service.pieces_before_failure = failure, 2
    *pieces, last = events((await client.post(path, json=STREAMS[path])).text)
    assert len(pieces) == 2
    told = last["error"]
    assert message in (told if isinstance(told, str) else told["message"])
    assert "inner" not in json.dumps(last)


@pytest.mark.parametrize("path", STREAMS)
async def test_the_deadline_counts_for_the_whole_answer(service: FakeService, path: str) -> None:
    service.go.clear()
    async with client_of(service, request_timeout_s=0.1) as client:
        response = await client.post(path, json=STREAMS[path])
    assert response.status_code == 200
    first, last = events(response.text)
    assert "error" in last
    assert "error" not in first
    await asyncio.wait_for(service.cancelled.wait(), 20)


@pytest.mark.parametrize("path", STREAMS)
async def test_a_client_that_leaves_midway_stops_the_work(service: FakeService, path: str) -> None:
    service.go.clear()
    async with served(edge_app(service)) as (host, port), httpx.AsyncClient() as client:
        async with client.stream("POST", f"http://{host}:{port}{path}", json=STREAMS[path]) as response:
            async for _ in response.aiter_lines():
                break
        await asyncio.wait_for(service.cancelled.wait(), 20)


async def test_pieces_arrive_while_the_rest_is_still_computed(service: FakeService) -> None:
    service.go.clear()
    async with (
        served(edge_app(service)) as (host, port),
        httpx.AsyncClient() as client,
        client.stream("POST", f"http://{host}:{port}/", json=STREAMS["/"]) as response,
    ):
        lines = response.aiter_lines()
        first = await anext(lines)
        service.go.set()
        rest = [line async for line in lines if line]
    assert json.loads(first.removeprefix("data: "))["token"]["text"] == WORDS[0]
    assert len(rest) == len(WORDS)


@pytest.mark.parametrize("path", ["/v1/completions", "/"])
async def test_only_one_answer_is_streamed_at_a_time(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    field, status = ("prompt", 400) if path == "/v1/completions" else ("inputs", 422)
    assert (await client.post(path, json={**STREAMS[path], field: ["a", "b"]})).status_code == status
    assert service.requests == []


async def test_a_stream_needs_a_text_to_go_on_with_not_a_task_that_answers_at_once() -> None:
    async with client_of(FakeService(task="text-classification")) as client:
        response = await client.post("/", json={"inputs": "a", "stream": True})
    assert response.headers["content-type"] == "application/json"

"""One line of JSON a request; nothing that a client sends can forge one, and nothing of the input is in it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app import errors
from serve_app.ingress.access_log import logger, start_log
from tests.ingress.edge import FakeService, client_of, edge_app, served
from tests.ingress.test_access import ALICE, Guarded
from tests.ingress.test_body import Connection

GOOD = {"inputs": "a secret text"}
KEYS = {
    *("time", "request_id", "method", "route", "status", "code", "model", "task", "inputs", "tokens"),
    *("total_s", "tokenize_s", "queue_s", "forward_s", "key"),
}


class Lines(logging.Handler):
    """What a collector would read."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in "\n".join(self.written).splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.level, logger.propagate = before


async def test_nothing_is_logged_unless_it_is_wanted(client: httpx.AsyncClient, lines: Lines) -> None:
    await client.post("/embed", json=GOOD)
    assert lines.written == []


async def test_a_request_is_told_with_what_it_cost(service: FakeService, lines: Lines) -> None:
    async with client_of(service, log_requests=True) as client:
        response = await client.post("/models/tiny/embed", json=GOOD, headers={"x-request-id": "job-7"})
    (entry,) = lines.entries()
    assert set(entry) == KEYS
    told = {"request_id": "job-7", "method": "POST", "route": "/models/{name}/embed", "status": 200, "code": "ok"}
    made = {"model": "tiny", "task": "embedding", "inputs": 1, "key": None}
    times = {"tokenize_s": 0.0015, "queue_s": 0.0025, "forward_s": 0.0405}
    assert {**entry, **told, **made, **times} == entry
    assert entry["tokens"] == int(response.headers["x-compute-tokens"])
    assert "secret" not in lines.written[0]


async def test_a_stream_is_told_when_it_has_ended_with_all_its_tokens(lines: Lines) -> None:
    async with client_of(FakeService(task="text-generation"), log_requests=True) as client:
        await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    (entry,) = lines.entries()
    assert (entry["status"], entry["tokens"], entry["task"]) == (200, 11, "text-generation")


async def test_the_name_of_the_key_is_told_and_the_key_is_not(
    service: FakeService, tmp_path: Path, lines: Lines
) -> None:
    guarded = Guarded(service, tmp_path / "keys")
    guarded.app._settings.current = guarded.app._settings.current.model_copy(update={"log_requests": True})
    await guarded.status()
    await guarded.status(headers={"x-api-key": "a-secret"})
    known, unknown = lines.entries()
    assert (known["key"], known["status"]) == ("alice", 200)
    assert (unknown["key"], unknown["status"], unknown["code"]) == (None, 401, "unauthorized")
    assert not any("secret" in line for line in lines.written)
    assert ALICE["authorization"] not in "".join(lines.written)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(errors.OverloadedError("full"), 429, "overloaded"), (ZeroDivisionError("inner"), 500, "internal")],
)
async def test_a_failure_is_told_by_its_code(
    service: FakeService, lines: Lines, failure: Exception, status: int, code: str
) -> None:
    service.failure = failure
    async with client_of(service, log_requests=True) as client:
        await client.post("/embed", json=GOOD)
    (entry,) = lines.entries()
    assert (entry["status"], entry["code"], entry["model"]) == (status, code, "tiny")


async def test_a_client_that_left_is_told_as_499(service: FakeService, lines: Lines) -> None:
    service.go.clear()
    async with served(edge_app(service, log_requests=True)) as address:
        connection = await Connection.open(address)
        await connection.head("content-length: 14")
        await connection.send(b'{"inputs":"a"}')
        await asyncio.wait_for(service.started.wait(), 20)
        connection.writer.close()
        await asyncio.wait_for(service.cancelled.wait(), 20)
    (entry,) = lines.entries()
    assert (entry["status"], entry["code"]) == (499, "cancelled")


EVIL = '"}\r\n{"forged":"line","status":200}\n\u2028\x00\x1b[31m%s%n'


async def test_nothing_that_is_sent_makes_a_line_of_its_own(service: FakeService, lines: Lines) -> None:
    async with client_of(service, log_requests=True) as client:
        evil = EVIL.encode()
        headers = [
            (b"x-request-id", evil),
            (b"user-agent", evil),
            (b"x-api-key", evil),
            (b"x-request-timeout-ms", evil),
        ]
        await client.post("/embed", json={"inputs": EVIL, "model": EVIL}, headers=headers)
        await client.post("/embed", json={"inputs": EVIL, "model": EVIL})
        await client.post("/models/%22%7D%0D%0A%7B%22forged%22:1/embed", json={"inputs": EVIL})
        await client.request('G"ET', "/%0A{forged}")
    assert len(lines.entries()) == len(lines.written) == 4
    assert all(set(entry) == KEYS for entry in lines.entries())
    assert "forged" not in "".join(lines.written)


@given(st.text(max_size=40), st.binary(max_size=40))
@settings(
    max_examples=100,
    suppress_health_check=[*settings.default.suppress_health_check, HealthCheck.function_scoped_fixture],
)
def test_any_text_and_header_leave_one_line(lines: Lines, text: str, header: bytes) -> None:
    async def post() -> None:
        async with client_of(FakeService(), log_requests=True) as client:
            content = json.dumps({"inputs": text, "model": text}).encode()
            await client.post("/embed", content=content, headers=[(b"x-request-id", header)])

    lines.written.clear()
    asyncio.run(post())
    (entry,) = lines.entries()
    assert set(entry) == KEYS


def test_the_log_goes_to_standard_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = logger.level, logger.propagate
    try:
        start_log()
        start_log()
        logger.info("%s", "{}")
        assert capfd.readouterr() == ("{}\n", "")
    finally:
        logger.handlers.clear()
        logger.level, logger.propagate = before

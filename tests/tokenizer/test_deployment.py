"""A tokenizer replica drops calls that were cancelled before a thread began them, and calls for other versions."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from serve_app.errors import UnavailableError, VersionGoneError
from serve_app.tokenizer import deployment
from serve_app.tokenizer.deployment import TokenizerReplica
from serve_app.types import Forget, TokenizeCall, TokenizeRequest, Version, VersionCall

VERSION = Version("v1", "revision-1")


async def test_a_call_that_is_cancelled_before_its_turn_is_not_tokenized() -> None:
    go, begun, encoded = threading.Event(), threading.Event(), []

    def encode(requests: tuple[TokenizeRequest, ...]) -> str:
        begun.set()
        assert go.wait(30)
        encoded.append(requests[0].inputs)
        return "batch"

    replica = TokenizerReplica.__new__(TokenizerReplica)
    with ThreadPoolExecutor(1) as threads:
        replica._encoder, replica._threads = SimpleNamespace(encode=encode), threads  # type: ignore[assignment]
        replica._version, replica._begun = VERSION, {}
        calls = [
            asyncio.ensure_future(replica.tokenize(TokenizeCall((TokenizeRequest((text,), "truncate"),), "v1")))
            for text in ("runs", "is cancelled", "waits")
        ]
        await asyncio.to_thread(begun.wait, 10)
        calls[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
        go.set()
        assert [await calls[0], await calls[2]] == ["batch", "batch"]
    assert encoded == [("runs",), ("waits",)]


@pytest.mark.parametrize("version", ["v2", ""])
async def test_a_replica_answers_no_call_that_is_meant_for_another_version(version: str) -> None:
    replica = TokenizerReplica.__new__(TokenizerReplica)
    replica._version, replica._begun = VERSION, {}
    with pytest.raises(VersionGoneError):
        await replica.tokenize(TokenizeCall((), version))
    for method in (replica.card, replica.definition):
        with pytest.raises(VersionGoneError):
            await method(VersionCall(version))
    assert not await replica.forget(Forget("call", ())), "which is asked of whoever lives"


async def test_a_replica_with_a_thread_that_does_not_come_back_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Event()

    def encode(requests: tuple[TokenizeRequest, ...]) -> str:
        begun.set()
        assert go.wait(30)
        return "batch"

    replica = TokenizerReplica.__new__(TokenizerReplica)
    with ThreadPoolExecutor(2) as threads:
        replica._encoder, replica._threads = SimpleNamespace(encode=encode), threads  # type: ignore[assignment]
        replica._version, replica._begun = VERSION, {}
        replica._metrics = SimpleNamespace(look=lambda: None)  # type: ignore[assignment]
        call = asyncio.ensure_future(replica.tokenize(TokenizeCall((), "v1")))
        await asyncio.to_thread(begun.wait, 10)
        await replica.check_health()
        monkeypatch.setattr(deployment, "STUCK_AFTER_S", 0.0)
        for asked in (replica.check_health(), replica.forget(Forget("call", ()))):
            with pytest.raises(UnavailableError, match="has tokenized one call for"):
                await asked
        go.set()
        assert await call == "batch"
        await replica.check_health()

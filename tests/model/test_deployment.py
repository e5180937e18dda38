"""A model replica finds in its model's files what it is for, wherever they come from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from serve_app.config import CacheConfig, ModelConfig, ModelSettings
from serve_app.errors import ConfigError, InvalidInputError, ModelFailureError, UnavailableError, VersionGoneError
from serve_app.model import memory
from serve_app.model.deployment import ModelReplica
from serve_app.options import GenerationOptions
from serve_app.types import Forget, ForwardCall, GenerationCall, VersionCall
from tests.batches import NO_TOKENS
from tests.hub.models import write_tiny_bert
from tests.hub.server import local_hub
from tests.inprocess import served
from tests.model.generation.models import VOCABULARY, prompts, reference, tiny
from tests.model.generation.test_loader import saved
from tests.model.tiny import batch_of


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put back: a replica sets its own, to be offline."""
    with mock.patch.dict(os.environ):
        yield


async def replica(folder: Path, tmp_path: Path) -> ModelReplica:
    made = ModelReplica.__new__(ModelReplica)
    model = ModelConfig(name="tiny", source=str(folder), max_input_tokens=64)
    await made.__init__(model, CacheConfig(root=str(tmp_path / "cache"), directory_mode="direct"))  # type: ignore[misc]
    return made


def version_of_replica(serving: ModelReplica) -> str:
    """As Serve's routers are told it."""
    return serving.record_replica_metadata()["fingerprint"]


def test_a_model_of_the_hub_is_served_for_what_its_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generating, embedding = tmp_path / "gpt2", tmp_path / "bert"
    saved("gpt2", generating)
    write_tiny_bert(embedding)
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        configs = [
            ModelConfig(name=folder.name, source=f"org/{folder.name}", revision=hub.add(f"org/{folder.name}", folder))
            for folder in (generating, embedding)
        ]
        with served(configs, tmp_path / "cache") as base:
            asked = {"inputs": "hello", "parameters": {"max_new_tokens": 3}}
            text = httpx.post(f"{base}/models/gpt2", json=asked, timeout=60)
            vector = httpx.post(f"{base}/models/bert/embed", json={"inputs": "hello"}, timeout=60)
            told = httpx.get(f"{base}/info", timeout=60).json()
    assert [*text.json()[0]] == ["generated_text"]
    assert np.shape(vector.json()) == (1, 32)
    tasks = {model["served_model_name"]: model["task"] for model in told["models"]}
    assert tasks == {"gpt2": "text-generation", "bert": "embedding"}


def test_a_token_that_only_the_tokenizer_has_is_refused_for_its_request_alone(tmp_path: Path) -> None:
    """As where `resize_token_embeddings` was forgotten: every conversation has such tokens, and no plain text."""
    folder = saved("gpt2", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = [f"<known {i}>" for i in range(VOCABULARY - len(tokenizer))]
    tokenizer.add_tokens([*known, "<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = ModelConfig(name="tiny", source=str(folder), max_input_tokens=32)
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    with served([config], tmp_path / "cache") as base, httpx.Client(base_url=base, timeout=60) as client:
        refused = client.post("/v1/chat/completions", json=talk)
        streamed = client.post("/v1/chat/completions", json={**talk, "stream": True})
        text = client.post("/models/tiny", json={"inputs": "hello", "parameters": {"max_new_tokens": 3}})
        shown = client.post("/models/tiny/tokenize", json={"inputs": "a <|im_start|> b"})
    for answer in (refused, streamed):
        assert answer.status_code == 400
        assert "<|im_start|>" in answer.text
        assert "resize_token_embeddings" in answer.text
    assert text.status_code == shown.status_code == 200
    assert len(tokenizer) - 1 in [token["id"] for token in shown.json()[0]]


async def test_a_model_that_generates_takes_settings_and_streams(tmp_path: Path) -> None:
    serving = await replica(saved("gpt2", tmp_path / "model"), tmp_path)
    try:
        serving.reconfigure(ModelSettings(max_kv_tokens=500).model_dump())
        version = version_of_replica(serving)
        assert (await serving.describe(VersionCall(version))).max_batch_tokens == 500
        [prompt] = prompts([5])
        options = GenerationOptions(max_new_tokens=4)
        call = GenerationCall(np.array(prompt, np.int32), options, version=version)
        told = [piece.token async for pieces in serving.stream(call) for piece in pieces]
        assert told == reference(tiny("gpt2"), prompt, options)
        with pytest.raises(InvalidInputError):
            await serving.forward(ForwardCall(NO_TOKENS, "pooled", (), version=version))
        assert not await serving.forget(Forget("call", (0,)))
        await serving.check_health()
    finally:
        serving.__del__()


async def test_a_model_that_answers_at_once_refuses_a_budget_below_its_longest_input(tmp_path: Path) -> None:
    serving = await replica(write_tiny_bert(tmp_path / "model"), tmp_path)
    try:
        with pytest.raises(ConfigError, match="max_batch_tokens: 63"):
            serving.reconfigure({"max_batch_tokens": 63})
        with pytest.raises(InvalidInputError):
            await anext(serving.stream(generation_call(version_of_replica(serving))))
    finally:
        serving.__del__()


async def test_a_replica_whose_model_fails_for_any_text_is_replaced_and_one_poisoned_text_never_does_it(
    tmp_path: Path,
) -> None:
    serving = await replica(write_tiny_bert(tmp_path / "model"), tmp_path)
    version = version_of_replica(serving)

    async def failure_of(token: int) -> BaseException:
        call = ForwardCall(batch_of([[2, token, 3]]), "pooled", (None,), version=version)
        return (await serving.forward(call)).failures[0]

    try:
        for _ in range(20):
            assert isinstance(await failure_of(10_000_000), ModelFailureError)
            await serving.check_health()
        with mock.patch.object(serving._model._runner, "_forward", side_effect=RuntimeError("a kernel said no")):
            with contextlib.suppress(UnavailableError):  # which ends the loop, once it has given up
                for _ in range(MOST_FAILURES):
                    await failure_of(7)
            with pytest.raises(UnavailableError, match="fails for any input"):
                await serving.check_health()
    finally:
        serving.__del__()


MOST_FAILURES = 40
"""Twenty of one text made the replica patient; it is found out all the same."""


async def test_a_replica_bounds_the_kernels_that_are_kept_before_it_computes(tmp_path: Path) -> None:
    os.environ.pop(memory.KERNEL_CACHE, None)
    serving = await replica(write_tiny_bert(tmp_path / "model"), tmp_path)
    serving.__del__()
    assert os.environ[memory.KERNEL_CACHE] == memory.KERNELS


async def test_settings_reach_the_watchdog_of_either_kind_of_model(tmp_path: Path) -> None:
    for folder in (write_tiny_bert(tmp_path / "bert"), saved("gpt2", tmp_path / "gpt2")):
        serving = await replica(folder, tmp_path / folder.name)
        try:
            serving.reconfigure({"max_forward_s": 47})
            assert serving._model._watchdog.limit_s == 47
        finally:
            serving.__del__()


def generation_call(version: str) -> GenerationCall:
    return GenerationCall(np.array([1], np.int32), GenerationOptions(), version=version)


@pytest.mark.parametrize("kind", ["generates", "answers at once"])
async def test_a_replica_that_cannot_compute_says_so_when_it_is_asked_whether_it_lives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    serving = await replica(saved("gpt2", folder) if kind == "generates" else write_tiny_bert(folder), tmp_path)
    try:
        assert not await serving.forget(Forget("call", ()))
        monkeypatch.setattr(serving._model, "check", mock.Mock(side_effect=UnavailableError("the device hangs")))
        with pytest.raises(UnavailableError, match="the device hangs"):
            await serving.forget(Forget("call", ()))
    finally:
        serving.__del__()


async def test_a_replica_answers_no_call_that_is_meant_for_another_version(tmp_path: Path) -> None:
    serving = await replica(write_tiny_bert(tmp_path / "model"), tmp_path)
    try:
        for version in ("another", ""):
            with pytest.raises(VersionGoneError):
                await serving.forward(ForwardCall(NO_TOKENS, "pooled", (), version=version))
            with pytest.raises(VersionGoneError):
                await anext(serving.stream(generation_call(version)))
            for method in (serving.describe, serving.memory_summary):
                with pytest.raises(VersionGoneError):
                    await method(VersionCall(version))
    finally:
        serving.__del__()

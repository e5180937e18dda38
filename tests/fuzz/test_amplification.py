"""Small requests that ask for much: each is answered or refused, and costs the server no more than it can bear.

Bounds are in work: time on the CPU of the event loop's thread, as a multiple of a million steps of Python on the same
machine; megabytes by which the process grew; bytes of the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.config import IngressSettings
from tests.fuzz.watched import unit_s, watched
from tests.inprocess import Running

MOST_UNITS = 8
"""Of one turn of the event loop, which reads bodies of 2 MB and writes answers of 64 MiB."""

MOST_UNITS_OF_READING = 20
"""Of one that reads a body of 10 MB, the most there is by default."""

MOST_MB = 400
"""All tiers are in this process, and numbers cross between them as copies."""

MOST_BYTES = 1.25 * (IngressSettings().max_answer_bytes or 0)

WINDOWS = {"long_texts": "windows"}
LEFT = {"truncation_direction": "left"}
LONG, OTHER = "a " * 9000, "b " * 9000
WORDS = "b c d e " * 1000
LABELS = [f"label {i}" for i in range(100_000)]


def question(**parameters: Any) -> Any:
    return {"inputs": {"question": "a", "context": WORDS}, "parameters": parameters}


def generating(**parameters: Any) -> Any:
    return {"inputs": "hello", "parameters": {"max_new_tokens": 5, "do_sample": True, **parameters}}


def marked(texts: int, **parameters: Any) -> Any:
    return {"inputs": ["[MASK] " * 60] * texts, "parameters": parameters}


ANSWERED: dict[str, tuple[str, Any]] = {
    "a pair of long texts": ("text-classification/predict", {"inputs": [LONG, OTHER]}),
    "a pair cut from the left": (
        "text-classification/predict",
        {"inputs": [LONG, OTHER], **LEFT},
    ),
    "pairs of long texts": ("text-classification", {"inputs": [[LONG, OTHER]] * 50}),
    "a long query": ("rerank/rerank", {"query": LONG, "texts": [OTHER] * 20}),
    "a text without an end": ("embedding/embed", {"inputs": "a" * 900_000}),
    "windows that share nearly all": (
        "embedding/embed",
        {"inputs": "! " * 600, **WINDOWS, "stride": 505},
    ),
    "answers of any length": ("question-answering", question(top_k=1, max_answer_len=100_000)),
    "many answers of any length": ("question-answering", question(top_k=1000, max_answer_len=100_000)),
    "many questions": ("question-answering", {**question(top_k=200), "inputs": [question()["inputs"]] * 5}),
    "as many fills as may be": ("fill-mask", marked(2, top_k=160)),
    "targets as long as may be": ("fill-mask", {"inputs": "[MASK]", "parameters": {"targets": [LONG[:2000]] * 100}}),
    "entities": ("token-classification", {"inputs": ["! " * 500] * 60}),
    "entities of words": (
        "token-classification",
        {"inputs": ["! " * 500] * 60, "parameters": {"aggregation_strategy": "average"}},
    ),
    "vectors of tokens": ("embedding/embed_all", {"inputs": ["! " * 100] * 100}),
    "sparse vectors": ("sparse-embedding/embed_sparse", {"inputs": ["a"] * 500}),
    "labels": ("zero-shot", {"inputs": "a", "parameters": {"candidate_labels": LABELS[:1000], "multi_label": True}}),
    "next to no temperature": ("text-generation", generating(temperature=1e-300)),
    "next to no top_p": ("text-generation", generating(top_p=1e-300)),
    "more new tokens than there are": ("text-generation", generating(max_new_tokens=2**31 - 1)),
}
REFUSED: dict[str, tuple[str, Any]] = {
    "more answers than anybody reads": ("question-answering", question(top_k=100_000)),
    "answers in many windows": ("question-answering", question(top_k=1000, max_seq_len=20)),
    "more fills than anybody reads": ("fill-mask", marked(20, top_k=100_000)),
    "more targets than anybody has": ("fill-mask", {"inputs": "[MASK]", "parameters": {"targets": LABELS}}),
    "fills of a long text": (
        "fill-mask",
        {"inputs": "a " * 100_000 + "[MASK] " * 20, "parameters": {"top_k": 900, **WINDOWS}},
    ),
    "more labels to ignore than there are": (
        "token-classification",
        {"inputs": "a", "parameters": {"ignore_labels": LABELS}},
    ),
    "vectors of more tokens": ("embedding/embed_all", {"inputs": ["small words " * 80] * 2000}),
    "too many windows": ("embedding/embed", {"inputs": "! " * 5000, **WINDOWS, "stride": 509}),
    "a penalty without numbers": ("text-generation", generating(repetition_penalty=1e-300)),
}

LARGEST: dict[str, tuple[str, Any]] = {
    "of texts": ("embedding/embed", {"inputs": ['"[word] ' * 450] * 2048, "dimensions": 100_000}),
    "of token ids": ("embedding/embed", {"inputs": [[12345] * 780] * 2048, "dimensions": 100_000}),
}


@pytest.fixture
def client(application: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=application.base_url, timeout=120, trust_env=False) as client:
        yield client


def bearable(
    application: Running, client: httpx.Client, path: str, body: Any, most_units: int = MOST_UNITS
) -> httpx.Response:
    """The answer, which cost no more than may be."""
    unit = unit_s()
    with watched(application.loop) as spent:
        answer = client.post(f"/models/{path}", json=body)
    assert spent.turn_s <= most_units * unit
    assert spent.grew_mb <= MOST_MB
    assert len(answer.content) <= MOST_BYTES
    return answer


@pytest.mark.parametrize("name", ANSWERED)
def test_a_request_that_asks_for_much_is_answered(application: Running, client: httpx.Client, name: str) -> None:
    answer = bearable(application, client, *ANSWERED[name])
    assert answer.status_code == 200, answer.text[:500]


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_asks_for_too_much_is_told_so(application: Running, client: httpx.Client, name: str) -> None:
    answer = bearable(application, client, *REFUSED[name])
    assert answer.status_code in (400, 422), answer.text[:500]
    assert any(digit in answer.json()["error"] for digit in "123456789")


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_body_is_read_in_bounded_time(application: Running, client: httpx.Client, name: str) -> None:
    path, body = LARGEST[name]
    answer = bearable(application, client, path, body, MOST_UNITS_OF_READING)
    assert answer.status_code == 422, answer.text[:500]


def test_a_turn_that_takes_long_is_noticed(application: Running) -> None:
    async def busy() -> None:
        end = time.thread_time() + 2 * MOST_UNITS * unit
        while time.thread_time() < end:
            pass

    unit = unit_s()
    with watched(application.loop) as spent:
        asyncio.run_coroutine_threadsafe(busy(), application.loop).result(timeout=120)
    assert spent.turn_s > MOST_UNITS * unit

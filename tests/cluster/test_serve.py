"""The whole application as a user runs it: `serve run serve_config.yaml`, real Ray, real model, real HTTP."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.live import Live, served
from tests.reference import cosines, minilm_embeddings, mixed_texts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def base_url(live: Live) -> str:
    return live.base_url


def embed(base_url: str, inputs: object, **options: object) -> np.ndarray:
    answer = httpx.post(f"{base_url}/embed", json={"inputs": inputs, **options}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json(), np.float32)


EDGES = [
    "hello",
    "x",
    "a cat sat on the mat",
    "long " * 600,
    "naïve café ☕ 你好 مرحبا",
    "e\u0301 zero\u200bwidth",
    "nul\x00byte",
    "w" * 10_000,
    "line\r\nline",
]


@pytest.mark.parametrize("text", EDGES, ids=[repr(text[:12]) for text in EDGES])
def test_a_single_text_equals_the_model_run_directly(base_url: str, text: str):
    vectors = embed(base_url, text)
    assert vectors.shape == (1, 384)
    assert cosines(vectors, minilm_embeddings([text]))[0] > 0.9999


def test_32_texts_at_once_equal_the_model_run_directly(base_url: str):
    texts = mixed_texts(32)
    assert cosines(embed(base_url, texts), minilm_embeddings(texts)).min() > 0.9999


async def test_5000_mixed_requests_of_64_clients_each_get_their_own_answer(base_url: str):
    texts = mixed_texts(1000, seed=1)
    wrong: list[str] = []
    vectors: dict[int, np.ndarray] = {}
    numbers = iter(range(5000))

    async def one_client(client: httpx.AsyncClient) -> None:
        for number in numbers:
            answer = await client.post("/embed", json={"inputs": texts[number % 1000]})
            if answer.status_code != 200:
                wrong.append(answer.text)
                continue
            vector = np.array(answer.json()[0], np.float32)
            first = vectors.setdefault(number % 1000, vector)
            if cosines([vector], [first])[0] < 0.99999:
                wrong.append(f"request {number} differs from its earlier answer")

    async with httpx.AsyncClient(base_url=base_url, timeout=120) as client:
        await asyncio.gather(*(one_client(client) for _ in range(64)))
    assert wrong == []
    answered = np.stack([vectors[i] for i in range(1000)])
    assert cosines(answered, minilm_embeddings(texts)).min() > 0.9999


def test_concurrent_requests_share_calls_to_the_tiers(base_url: str):
    """Coalescing is real: far fewer batches than requests."""
    requests_before, batches_before = coalesced(base_url)

    async def burst() -> None:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            await asyncio.gather(*(client.post("/embed", json={"inputs": f"text {i} " * 30}) for i in range(200)))

    asyncio.run(burst())
    deadline = time.monotonic() + 60
    while (after := coalesced(base_url))[0] - requests_before < 200 and time.monotonic() < deadline:
        time.sleep(0.5)
    requests, batches = after[0] - requests_before, after[1] - batches_before
    assert requests >= 200  # those of an earlier test may have been reported late
    assert 0 < batches <= requests / 2


def coalesced(base_url: str) -> tuple[float, float]:
    """Requests answered, and the calls that they shared.

    Ray makes the sum of a histogram from the middles of its buckets; counts are exact.
    """
    text = httpx.get(f"{base_url}/metrics", timeout=30).text
    return total(text, "ray_serve_app_requests_total"), total(text, "ray_serve_app_coalesced_requests_count")


def total(exposition: str, name: str, label: str = "") -> float:
    """Sum over the series of that name, and with that label."""
    lines = [line for line in exposition.splitlines() if line.startswith(f"{name}{{") and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_bad_input_in_a_batch_leaves_its_neighbours_alone(base_url: str):
    good, bad = {"inputs": "good"}, {"inputs": "too long " * 400, "truncate": False}

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/embed", json=bad if i % 3 else good) for i in range(60)))

    answers = asyncio.run(burst())
    for i, answer in enumerate(answers):
        assert answer.status_code == (422 if i % 3 else 200), answer.text
        if i % 3:
            assert answer.json()["code"] == "input_too_long"
            assert "802 tokens" in answer.json()["error"]


def test_health_ready_info_and_docs_answer(base_url: str):
    assert httpx.get(f"{base_url}/health").status_code == 200
    assert httpx.get(f"{base_url}/ready", timeout=30).status_code == 200
    info = httpx.get(f"{base_url}/info", timeout=30).json()
    assert info["model_dtype"] == "float32"
    assert info["max_input_length"] == 256
    assert httpx.get(f"{base_url}/docs").status_code == 200
    assert "/embed" in httpx.get(f"{base_url}/openapi.json").json()["paths"]


def test_the_request_id_stands_once_in_the_answer(base_url: str):
    answer = httpx.post(f"{base_url}/embed", json={"inputs": "x"}, headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert len(httpx.post(f"{base_url}/embed", json={}).headers.get_list("x-request-id")) == 1


@pytest.fixture(scope="module")
def own() -> Iterator[Live]:
    """A server that tests may harm, and whose ingress holds little back from the model's replicas."""

    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["deployments"][0]["user_config"]["max_concurrent_batches"] = 16

    with served(change) as running:
        yield running


LONG = "word " * 300  # as many tokens as the model takes
TOKENS = 256


def counted(live: Live) -> dict[str, float]:
    """What the model's replicas computed and dropped, in tokens, and the requests that left when they were there."""
    text = httpx.get(f"{live.base_url}/metrics", timeout=30).text
    return {
        "computed": total(text, "ray_serve_app_computed_tokens_total"),
        "dropped": total(text, "ray_serve_app_abandoned_tokens_total"),
        "left": total(text, "ray_serve_app_abandoned_requests_total", 'stage="model"'),
        "calls": total(text, "ray_serve_app_coalesced_requests_count"),
    }


def test_what_clients_left_behind_in_a_replicas_queue_is_not_computed(own: Live):
    """Both replicas are busy for seconds; behind that work clients queue, and every second one leaves."""
    busy, clients = 2 * 150, 60

    async def load() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=own.base_url, timeout=120, limits=httpx.Limits()) as client:
            ahead = [client.post("/embed", json={"inputs": [LONG] * (busy // 2)}) for _ in range(2)]
            working = [asyncio.create_task(one) for one in ahead]
            await asyncio.sleep(1)
            queued = [
                asyncio.create_task(client.post("/embed", json={"inputs": f"{i} {LONG}"})) for i in range(clients)
            ]
            await asyncio.sleep(2)
            for task in queued[::2]:
                task.cancel()
            return await asyncio.gather(*working, *queued[1::2])

    answers = asyncio.run(load())
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    vectors = np.array([answer.json()[0] for answer in answers[2:]], np.float32)
    assert cosines(vectors, minilm_embeddings([f"{i} {LONG}" for i in range(1, clients, 2)])).min() > 0.9999

    stayed, most = (busy + clients / 2) * TOKENS, (busy + clients + 1) * TOKENS

    def failing() -> list[str]:
        """What does not hold (yet): replicas report every few seconds, each for itself."""
        now = counted(own)
        holds = {
            "all that stayed was computed": now["computed"] >= stayed,
            "nothing was computed and dropped too": now["computed"] + now["dropped"] < most,
            "clients left when the model had their texts": now["left"] > clients / 8,
            "most of these were never computed": now["dropped"] > now["left"] / 2 * TOKENS,
            "those that left shared calls with those that stayed": 0 < now["calls"] < clients / 2,
        }
        return [f"{what}: {now}" for what, held in holds.items() if not held]

    deadline = time.monotonic() + 60
    while (missing := failing()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert missing == []


def test_a_model_replica_killed_under_load_fails_no_request(own: Live):
    async def load() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=own.base_url, timeout=60) as client:
            tasks = [asyncio.create_task(client.post("/embed", json={"inputs": f"{i} word " * 40})) for i in range(200)]
            await asyncio.sleep(0.3)
            os.kill(_replica_pid(own, "model"), signal.SIGKILL)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(load())
    assert [a.text for a in answers if a.status_code != 200] == []


def _replica_pid(live: Live, tier: str) -> int:
    for process in live.processes():
        if f"all-MiniLM-L6-v2-{tier}" in " ".join(process.cmdline()):
            return process.pid
    raise AssertionError(f"no {tier} replica among {[p.cmdline()[:1] for p in live.processes()]}")


def test_ctrl_c_leaves_no_process_behind(own: Live):
    assert own.processes()
    own.interrupt()
    deadline = time.monotonic() + 15
    while own.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [p.cmdline() for p in own.processes()] == []

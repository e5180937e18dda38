from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from serve_app.cli.bench.ceiling import CeilingPlan, direct_vectors
from serve_app.cli.bench.corpus import make_corpus
from serve_app.cli.main import main

from .conftest import Answer, FakeServer

TEXTS = 16
QUICK = ["--texts", str(TEXTS), "--seconds", "0.3", "--warmup", "0.1", "--repeats", "2", "--scenarios", "2x1,1x4"]


@pytest.fixture(scope="module")
def vectors(minilm: Path) -> dict[str, list[float]]:
    """Text -> its embedding, as the model really computes it."""
    rows = direct_vectors(CeilingPlan(str(minilm), 256, TEXTS, 0, 1, 1, (1024,)))
    return dict(zip(make_corpus(minilm, TEXTS).texts, rows.tolist(), strict=True))


def embedding(vectors: dict[str, list[float]]) -> Answer:
    return lambda path, body: (200, [vectors[text] for text in body["inputs"]])


def test_a_run_tells_throughput_and_the_share_of_the_ceiling(
    vectors: dict[str, list[float]],
    serving: Callable[[Answer], FakeServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, file = serving(embedding(vectors)), tmp_path / "out.json"

    status = main(["bench", "--url", server.url, *QUICK, "--verify", "--ceiling-budgets", "512", "--json", str(file)])

    assert status == 0
    told = orjson.loads(file.read_bytes())
    assert [result["scenario"] for result in told["results"]] == ["2x1", "1x4"]
    for result in told["results"]:
        assert len(result["repeats"]) == 2
        assert result["median"]["texts_per_s"] > 0
        assert result["share_of_ceiling"] > 0
        assert result["verdict"]["checked"] > 0
        assert result["verdict"]["least_cosine"] == pytest.approx(1.0, abs=1e-4)
        assert result["median"]["server_cpu_s_per_1000_texts"] > 0
    assert len(told["ceilings"]) == 2
    assert "of ceiling" in capsys.readouterr().out


def run_without_ceiling(server: FakeServer, *more: str) -> int:
    return main(["bench", "--url", server.url, *QUICK, "--no-ceiling", "--server-pid", str(os.getpid()), *more])


@pytest.mark.parametrize("protocol", ["tei", "openai", "hf"])
def test_every_protocol_is_spoken(protocol: str, serving: Callable[[Answer], FakeServer]) -> None:
    paths = set()

    def answer(path: str, body: Any) -> tuple[int, Any]:
        paths.add(path)
        rows = np.ones((len(body.get("inputs") or body["input"]), 384)).tolist()
        data = {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}
        return 200, data if protocol == "openai" else rows

    assert run_without_ceiling(serving(answer), "--protocol", protocol, "--model", "minilm") == 0
    assert paths == {{"tei": "/embed", "openai": "/v1/embeddings", "hf": "/models/minilm"}[protocol]}


def test_wrong_dimensions_fail_the_run(
    serving: Callable[[Answer], FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serving(lambda path, body: (200, [[1.0, 2.0]] * len(body["inputs"])))

    assert run_without_ceiling(server) == 1
    assert "vectors of shape (1, 2) for 1 texts of 384 dimensions" in capsys.readouterr().out


def test_answers_of_another_text_fail_a_verified_run(
    vectors: dict[str, list[float]], serving: Callable[[Answer], FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = dict(zip(vectors, [*list(vectors.values())[1:], next(iter(vectors.values()))], strict=True))

    assert run_without_ceiling(serving(embedding(mixed)), "--verify") == 1
    assert "with direct computation" in capsys.readouterr().out


def test_errors_fail_the_run(serving: Callable[[Answer], FakeServer], capsys: pytest.CaptureFixture[str]) -> None:
    asked = iter(range(10**9))

    def answer(path: str, body: Any) -> tuple[int, Any]:
        return (429, {"error": "busy"}) if next(asked) % 3 == 2 else (200, [[1.0] * 384] * len(body["inputs"]))

    assert run_without_ceiling(serving(answer)) == 1
    assert "x 429" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:1", *QUICK, "--no-ceiling"]) == 1
    assert "no server answers http://127.0.0.1:1/embed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenarios", "32"], "--scenarios"),
        (["--url", "https://host"], "--url"),
        (["--model-path", "no/such/folder"], "--model-path"),
        (["--serve", "no/such/file.yaml"], "--serve"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err

from __future__ import annotations

import re

import numpy as np
import orjson
import pytest

from serve_app.cli.bench.load import Outcome, Window
from serve_app.cli.bench.measure import Sample, Scenario, parse_scenarios, summarize, verify
from serve_app.cli.bench.wire import Prepared
from serve_app.errors import ConfigError
from serve_app.types import FloatArray

REFERENCE: FloatArray = np.eye(4, 3, dtype=np.float32) + 1


def sample(vectors: FloatArray, first: int = 0) -> Sample:
    return Sample(first, len(vectors), orjson.dumps(vectors.tolist()))


def test_scenarios_are_connections_by_texts() -> None:
    assert parse_scenarios("1x1, 8x32") == [Scenario(1, 1), Scenario(8, 32)]


@pytest.mark.parametrize("text", ["", "8", "x8", "8x", "0x1", "8x-1", "8*2"])
def test_other_scenarios_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--scenarios"):
        parse_scenarios(text)


def test_only_good_answers_count_as_work() -> None:
    requests = [Prepared(b"", 0, texts=2, tokens=10)]
    outcomes = [
        Outcome(0, 1.0, 1.5, 200),
        Outcome(0, 2.0, 2.1, 429),
        Outcome(0, 3.0, 3.1, 0),
        Outcome(0, 4.0, 4.1, 429),
    ]

    measured = summarize(outcomes, requests, Window(0.0, 10.0), server_cpu_s=0.5)

    assert measured.texts_per_s == pytest.approx(0.2)
    assert measured.tokens_per_s == pytest.approx(1.0)
    assert measured.server_cpu_s_per_1000_texts == pytest.approx(250.0)
    assert measured.errors == {"429": 2, "no answer": 1}
    assert measured.p50_s == pytest.approx(0.5)


def test_latencies_are_those_of_requests_that_began_in_the_window() -> None:
    """Slow ones that end after it are among them: leaving them out would flatter the tail."""
    requests = [Prepared(b"", 0, 1, 5)]
    outcomes = [Outcome(0, -5.0, 1.0, 200), Outcome(0, 1.0, 2.0, 200), Outcome(0, 9.0, 19.0, 200)]

    measured = summarize(outcomes, requests, Window(0.0, 10.0))

    assert measured.requests == 2
    assert measured.p50_s == pytest.approx(5.5)


def test_a_server_that_answers_nothing_is_summarized() -> None:
    measured = summarize([Outcome(0, 1.0, 2.0, 0)], [Prepared(b"", 0, 1, 5)], Window(0.0, 10.0), server_cpu_s=1.0)

    assert measured.texts_per_s == 0
    assert measured.server_cpu_s_per_1000_texts is None


def test_right_answers_are_right_at_any_length() -> None:
    verdict = verify([sample(REFERENCE[1:3] * 0.3, first=1), sample(REFERENCE[:1])], "tei", 3, REFERENCE)

    assert (verdict.checked, verdict.wrong) == (2, 0)
    assert verdict.least_cosine == pytest.approx(1.0)


def test_an_answer_for_another_text_is_wrong() -> None:
    verdict = verify([sample(REFERENCE[1:3], first=0)], "tei", 3, REFERENCE)

    assert verdict.wrong == 1
    assert "cosine" in verdict.reason


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        (np.ones((1, 3), np.float32), r"shape \(1, 3\) for 2 texts of 3 dimensions"),
        (np.ones((2, 4), np.float32), r"shape \(2, 4\) for 2 texts"),
    ],
)
def test_too_few_or_too_short_vectors_are_wrong(vectors: FloatArray, reason: str) -> None:
    verdict = verify([Sample(0, 2, orjson.dumps(vectors.tolist()))], "tei", 3)

    assert verdict.wrong == 1
    assert re.search(reason, verdict.reason)


def test_vectors_of_zeros_or_nan_are_wrong() -> None:
    for vectors in (np.zeros((1, 3), np.float32), np.full((1, 3), np.nan, np.float32)):
        body = orjson.dumps(vectors.tolist()).replace(b"null", b"0.0")
        assert verify([Sample(0, 1, body)], "tei", 3, REFERENCE).wrong == 1

"""Several nodes' expositions as one, read back with the parser of Prometheus' own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    enable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from serve_app.ingress.prometheus import merge


@pytest.fixture(autouse=True)
def without_times_of_creation() -> Iterator[None]:
    """Which the client would write beside every counter, and which never are the same."""
    disable_created_metrics()
    yield
    enable_created_metrics()


def exposition(node: str, *, requests: float = 1.0, seconds: float = 0.5) -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests answered.", ["node"], registry=registry).labels(node).inc(requests)
    Histogram("seconds", "Seconds.", ["node"], registry=registry, buckets=(0.1, 1.0)).labels(node).observe(seconds)
    Gauge(f"only_on_{node}", 'With "quotes" and \\ in its help.', registry=registry).set(3)
    return generate_latest(registry).decode()


def parsed(text: str) -> dict[str, tuple[str, str, set[Any]]]:
    """Family → its type, help and samples. Raises ValueError where the format is broken."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a family stands twice"
    return {
        family.name: (family.type, family.documentation, {_sample(sample) for sample in family.samples})
        for family in families
    }


def _sample(sample: Any) -> tuple[str, tuple[tuple[str, str], ...], float]:
    return sample.name, tuple(sorted(sample.labels.items())), sample.value


def test_one_exposition_stays_what_it_is() -> None:
    assert parsed(merge([exposition("a")])) == parsed(exposition("a"))


def test_samples_of_all_nodes_stand_in_one_family() -> None:
    first, second = parsed(exposition("a")), parsed(exposition("b", requests=5, seconds=2))
    merged = parsed(merge([exposition("a"), exposition("b", requests=5, seconds=2)]))
    assert set(merged) == set(first) | set(second)
    for name, (kind, documentation, samples) in merged.items():
        parts = [part[name] for part in (first, second) if name in part]
        assert samples == set().union(*(part[2] for part in parts))
        assert {(kind, documentation)} == {part[:2] for part in parts}


def test_head_lines_stand_once_and_before_their_samples() -> None:
    lines = merge([exposition("a"), exposition("b"), exposition("c")]).splitlines()
    for head in ("# HELP seconds ", "# TYPE seconds "):
        assert sum(line.startswith(head) for line in lines) == 1
    own = [i for i, line in enumerate(lines) if line.startswith("seconds")]
    assert own == list(range(own[0], own[0] + len(own)))
    assert [line.split(" ")[1] for line in lines[own[0] - 2 : own[0]]] == ["HELP", "TYPE"]


def test_the_first_help_stands_where_nodes_differ() -> None:
    texts = [f'# HELP up {words}\n# TYPE up gauge\nup{{n="{words}"}} 1.0\n' for words in ("one", "other")]
    assert merge(texts) == '# HELP up one\n# TYPE up gauge\nup{n="one"} 1.0\nup{n="other"} 1.0\n'


def test_a_sample_that_two_nodes_tell_alike_stands_once() -> None:
    """Prometheus refuses a scrape that has a sample twice."""
    assert merge([exposition("a"), exposition("a")]) == merge([exposition("a")])


def test_a_node_that_has_nothing_yet_changes_nothing() -> None:
    assert merge(["", exposition("a"), "\n"]) == merge([exposition("a")])


@pytest.mark.parametrize("end", ["", "\n", "\n# EOF\n"])
def test_other_comments_and_ends_of_file_are_left_out(end: str) -> None:
    text = "# a comment\n# HELP up Whether.\n# TYPE up gauge\nup 1.0" + end
    assert merge([text]) == "# HELP up Whether.\n# TYPE up gauge\nup 1.0\n"


labels = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=8)


@given(nodes=st.lists(st.tuples(labels, st.floats(0, 1e6)), max_size=6, unique_by=lambda node: node[0]))
def test_no_sample_is_lost_whatever_the_labels_and_values(nodes: list[tuple[str, float]]) -> None:
    texts = []
    for label, value in nodes:
        registry = CollectorRegistry()
        Gauge("queued", "Waiting.", ["model"], registry=registry).labels(label).set(value)
        texts.append(generate_latest(registry).decode())
    samples = parsed(merge(texts)).get("queued", ("", "", set()))[2]
    assert samples == {("queued", (("model", label),), value) for label, value in nodes}

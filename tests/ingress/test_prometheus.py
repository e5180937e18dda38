"""Several nodes' expositions, fetched off the event loop and merged, read back with Prometheus' own parser."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

from serve_app.errors import UnavailableError
from serve_app.ingress import prometheus
from serve_app.ingress.prometheus import Address, ClusterMetrics, merge


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


class Node:
    """An endpoint that tells `text` once it may."""

    def __init__(self, text: str) -> None:
        self.asked = 0
        self.go = threading.Event()
        self.go.set()
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                node.asked += 1
                assert node.go.wait(20)
                self.send_response(200 if self.path == "/metrics" and text else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address: Address = ("127.0.0.1", self._server.server_address[1])

    @contextlib.contextmanager
    def running(self) -> Iterator[Node]:
        thread = threading.Thread(daemon=True, target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


OURS = """# HELP ray_serve_app_requests_total Requests.
# TYPE ray_serve_app_requests_total counter
ray_serve_app_requests_total{model="tiny"} 3.0
"""
SERVES = """# HELP ray_serve_num_http_requests_total Requests.
# TYPE ray_serve_num_http_requests_total counter
ray_serve_num_http_requests_total{route="/"} 4.0
"""
RAYS = """# HELP ray_tasks Tasks.
# TYPE ray_tasks gauge
ray_tasks{name="ray_serve_app"} 5.0
"""


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with Node(OURS + RAYS).running() as first, Node(RAYS + SERVES).running() as second:
        yield first, second


def metrics_of(nodes: Sequence[Node], kept_s: float = 0.0) -> ClusterMetrics:
    return ClusterMetrics(lambda: [node.address for node in nodes], kept_s)


async def test_all_nodes_are_told_and_by_default_only_what_is_of_serve(nodes: tuple[Node, Node]) -> None:
    metrics = metrics_of(nodes)
    assert parsed((await metrics.text(False)).decode()) == parsed(OURS + SERVES)
    assert parsed((await metrics.text(True)).decode()) == parsed(OURS + RAYS + SERVES)


async def test_the_event_loop_turns_while_nodes_are_asked(nodes: tuple[Node, Node]) -> None:
    """Each node answers only when the loop has let it."""
    for node in nodes:
        node.go.clear()
    asking = asyncio.create_task(metrics_of(nodes).text(True))
    while not all(node.asked for node in nodes):
        await asyncio.sleep(0.001)
    assert not asking.done()
    for node in nodes:
        node.go.set()
    assert parsed((await asyncio.wait_for(asking, 20)).decode()) == parsed(OURS + RAYS + SERVES)


async def test_nothing_is_fetched_or_merged_on_the_event_loops_thread_or_with_tls(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[int] = []

    def noted(work: Any) -> Any:
        def call(*arguments: Any) -> Any:
            worked.append(threading.get_ident())
            return work(*arguments)

        return call

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an SSL context was made")

    for name in ("fetch", "_merged"):
        monkeypatch.setattr(prometheus, name, noted(getattr(prometheus, name)))
    monkeypatch.setattr(ssl, "SSLContext", refuse)
    metrics = ClusterMetrics(noted(lambda: [node.address for node in nodes]), 0.0)
    await metrics.text(False)
    assert len(worked) == 1 + 2 + 1
    assert threading.get_ident() not in worked


@pytest.mark.parametrize("kept_s", [0.0, 3600.0])
async def test_scrapes_at_the_same_time_ask_each_node_once(nodes: tuple[Node, Node], kept_s: float) -> None:
    metrics = metrics_of(nodes, kept_s)
    texts = await asyncio.gather(*(metrics.text(False) for _ in range(20)))
    assert len(set(texts)) == 1
    assert [node.asked for node in nodes] == [1, 1]
    assert await metrics.text(False) == texts[0]
    assert [node.asked for node in nodes] == ([1, 1] if kept_s else [2, 2])


async def test_nodes_that_do_not_answer_are_left_out() -> None:
    with Node(OURS).running() as there, Node("").running() as refusing:
        gone = Node("")
        gone._server.server_close()
        assert (await metrics_of([gone, there, refusing]).text(True)).decode() == OURS
        with pytest.raises(UnavailableError, match="no node's metrics endpoint answers"):
            await metrics_of([gone, refusing]).text(True)


def test_a_name_in_a_label_keeps_no_metric() -> None:
    assert merge([OURS + RAYS], "ray_serve_") == OURS

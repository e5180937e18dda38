from __future__ import annotations

import numpy as np
import orjson
import pytest

from serve_app.cli.bench.corpus import Corpus
from serve_app.cli.bench.wire import PROTOCOLS, ProtocolName, Target, prepare, read_vectors, target_of
from serve_app.errors import ConfigError

CORPUS = Corpus(("one", "two", "three", "four", "five"), (3, 4, 5, 6, 7))


def test_requests_are_whole_and_in_order() -> None:
    prepared = prepare(CORPUS, CORPUS.tokens, 2, Target("127.0.0.1", 8000))

    assert [(request.first, request.texts, request.tokens) for request in prepared] == [(0, 2, 7), (2, 2, 11)]
    head, body = prepared[1].payload.split(b"\r\n\r\n")
    assert head.startswith(b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert orjson.loads(body)["inputs"] == ["three", "four"]


def test_a_corpus_smaller_than_a_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not fill one request of 6"):
        prepare(CORPUS, CORPUS.tokens, 6, Target("127.0.0.1", 8000))


@pytest.mark.parametrize(
    ("protocol", "answer"),
    [
        ("tei", [[1.0, 2.0], [3.0, 4.0]]),
        ("hf", [[1.0, 2.0], [3.0, 4.0]]),
        ("openai", {"data": [{"index": 1, "embedding": [3.0, 4.0]}, {"index": 0, "embedding": [1.0, 2.0]}]}),
    ],
)
def test_vectors_are_found_in_every_protocol(protocol: ProtocolName, answer: object) -> None:
    assert np.array_equal(read_vectors(orjson.dumps(answer), protocol), [[1, 2], [3, 4]])


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"[1.0]", b"[[[1.0]]]", b'["x"]', b"[[1.0],[1.0,2.0]]", b"null"])
@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_another_answer_is_refused(protocol: ProtocolName, body: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_vectors(body, protocol)


@pytest.mark.parametrize(
    ("protocol", "route"), [("tei", "/embed"), ("openai", "/v1/embeddings"), ("hf", "/models/minilm")]
)
def test_each_protocol_has_its_route(protocol: ProtocolName, route: str) -> None:
    assert target_of("http://127.0.0.1:8000", protocol, "minilm").route == route


def test_a_path_in_the_url_wins() -> None:
    assert target_of("http://host:8000/models/minilm/embed", "tei", "minilm").route == "/models/minilm/embed"


@pytest.mark.parametrize("url", ["https://host", "host:8000", "http://", "ftp://host"])
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        target_of(url, "tei", "minilm")

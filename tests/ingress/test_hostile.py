"""Whatever is sent, to any route: never a 5xx, and a good request right after it is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.ingress.protocols.huggingface.endpoint import BODIES
from tests.ingress.edge import FakeService, client_of, edge_app, served
from tests.ingress.test_body import GOOD, Connection
from tests.ingress.test_openapi import POSTS, concrete, example_of

DEEP = 100_000


def bad_texts() -> Iterator[tuple[str, bytes]]:
    """JSON for a place where a text belongs."""
    yield "lone high surrogate", rb'"\ud800"'
    yield "lone low surrogate", rb'"\udc00"'
    yield "high surrogate and letter", rb'"\ud800A"'
    yield "surrogates the wrong way round", rb'"\udc00\ud800"'
    yield "surrogate as bytes", b'"\xed\xa0\x80"'
    yield "not UTF-8", b'"\xff\xfe"'
    yield "overlong UTF-8", b'"\xc0\xaf"'
    yield "UTF-8 cut short", b'"\xf0\x9f\x98"'
    yield "unknown escape", rb'"\x41"'
    yield "control character", b'"\x01"'
    yield "text cut short", b'"abc'
    yield "NaN", b"NaN"
    yield "Infinity", b"-Infinity"
    yield "number beyond floats", b"1e999"
    yield "5,000 digits", b"9" * 5000
    yield "deep lists", b"[" * DEEP + b"]" * DEEP
    yield "deep lists without an end", b"[" * DEEP
    yield "deep objects", b'{"a":' * DEEP
    yield "null", b"null"
    yield "a number", b"12"
    yield "true", b"true"
    yield "an empty list", b"[]"
    yield "an empty object", b"{}"
    yield "mixed list", b'["a", 1, null, {}, []]'
    yield "huge token id", b"[" + b"9" * 30 + b"]"
    yield "negative token id", b"[[-1]]"
    yield "10,000 texts", b"[" + b",".join([b'"a"'] * 10_000) + b"]"
    yield "a comparison with itself", b'{"source_sentence":{"source_sentence":"a"},"sentences":[["a"]]}'
    yield "a comparison without sentences", b'{"source_sentence":"a","sentences":{}}'


def bad_bodies() -> Iterator[tuple[str, bytes]]:
    for name, text in bad_texts():
        for field in (b"inputs", b"input"):
            yield f"{name} as {field.decode()}", b'{"%s":%s}' % (field, text)
    yield "nothing", b""
    yield "space", b"  \n"
    yield "no JSON", b"inputs=a"
    yield "a NUL byte", b"\x00"
    yield "a byte order mark", b'\xef\xbb\xbf{"inputs":"a"}'
    yield "UTF-16", '{"inputs":"a"}'.encode("utf-16")
    yield "two documents", b'{"inputs":"a"}{"inputs":"b"}'
    yield "trailing comma", b'{"inputs":"a",}'
    yield "single quotes", b"{'inputs':'a'}"
    yield "a comment", b'{"inputs":"a"} // hello'
    yield "cut short", b'{"inputs":"a"'
    yield "a list", b'["a"]'
    yield "a surrogate as key", rb'{"\ud800":1,"inputs":[]}'
    yield "a surrogate where nobody looks", rb'{"inputs":[],"metadata":"\ud800"}'
    yield "a model that is a path", b'{"inputs":"a","input":"a","model":"../../etc/passwd"}'
    yield "a model with a newline", rb'{"inputs":"a","input":"a","model":"a\r\nx-evil: 1"}'
    yield (
        "everything of the wrong type",
        json.dumps(
            {key: [{}] for key in ("inputs", "input", "model", "truncate", "normalize", "dimensions", "parameters")}
        ).encode(),
    )


BAD_BODIES = dict(bad_bodies())


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_a_4xx_and_the_next_request_is_answered(service: FakeService, path: str, name: str) -> None:
    async with client_of(service, any_model_name=False) as client:
        bad = await client.post(concrete(path), content=BAD_BODIES[name])
        assert 400 <= bad.status_code < 500, bad.text
        assert bad.json()["error"]
        assert service.requests == []
        assert (await client.post(concrete(path), json=example_of(path))).status_code == 200


TEXT_FIELDS = [
    ("/rerank", "query"),
    ("/rerank", "texts"),
    ("/decode", "ids"),
    ("/v1/rerank", "query"),
    ("/v1/rerank", "documents"),
    ("/v1/completions", "prompt"),
    ("/v1/chat/completions", "messages"),
]


@pytest.mark.parametrize(("path", "field"), TEXT_FIELDS)
@pytest.mark.parametrize("name", sorted(dict(bad_texts())))
async def test_a_bad_value_for_any_other_field_is_a_4xx_too(
    client: httpx.AsyncClient, service: FakeService, path: str, field: str, name: str
) -> None:
    rest = json.dumps({key: value for key, value in example_of(path).items() if key != field} | {"user": "a"}).encode()
    bad = await client.post(path, content=b'{"%s":%s,%s' % (field.encode(), dict(bad_texts())[name], rest[1:]))
    assert 400 <= bad.status_code < 500, bad.text
    assert service.requests == []
    assert (await client.post(path, json=example_of(path))).status_code == 200


@pytest.mark.parametrize("task", sorted(BODIES))
async def test_no_task_is_brought_down_by_a_bad_body(task: str) -> None:
    service = FakeService(task=task)
    async with client_of(service) as client:
        for name, content in BAD_BODIES.items():
            assert (await client.post("/", content=content)).status_code < 500, name
        good = BODIES[task].model_config["json_schema_extra"]["examples"][0]  # type: ignore[index,call-overload]
        assert (await client.post("/", json=good)).status_code == 200


@pytest.mark.parametrize("path", POSTS)
async def test_the_last_of_two_equal_keys_counts(client: httpx.AsyncClient, service: FakeService, path: str) -> None:
    example = example_of(path)
    first = json.dumps({next(iter(example)): []}).encode()
    response = await client.post(concrete(path), content=first[:-1] + b"," + json.dumps(example).encode()[1:])
    assert response.status_code == 200


@pytest.mark.parametrize("path", POSTS)
async def test_nan_where_nobody_looks_harms_nobody(client: httpx.AsyncClient, path: str) -> None:
    example = json.dumps(example_of(path)).encode()
    response = await client.post(concrete(path), content=b'{"metadata":[NaN,1e999],' + example[1:])
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/models/%00/embed", "/models/%FF/embed", "/models/%2E%2E/embed", "/models//embed"])
async def test_strange_paths_are_not_found(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path, json={"inputs": "a"})).status_code == 404


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /embed HTTP/1.1\r\nhost: e\r\ncontent-length: 14\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nhost: e\r\ncontent-length: 14\r\ncontent-length: 3\r\n\r\n" + GOOD,
        b"POST /embed HTTP/1.1\r\nhost: e\r\ncontent-length: -1\r\n\r\n" + GOOD,
        b"POST /embed HTTP/1.1\r\nhost: e\r\ncontent-length: " + b"9" * 400 + b"\r\n\r\n" + GOOD,
        b"POST /embed HTTP/1.1\r\nhost: e\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n" + GOOD,
        b"POST /embed HTTP/1.1\r\nhost: e\r\ntransfer-encoding: xchunked\r\n\r\n" + GOOD,
        b"POST /embed\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /embed HTTP/1.1\r\nhost: e\r\nx-request-id: a\rb\r\ncontent-length: 14\r\n\r\n" + GOOD,
        b"POST /embed HTTP/1.1\r\nhost: e\r\nx-big: " + b"a" * 1_000_000 + b"\r\n\r\n",
    ],
    ids=[
        "length and chunked",
        "two lengths",
        "negative length",
        "length of 400 digits",
        "chunk size that is none",
        "unknown transfer encoding",
        "no version",
        "TLS",
        "bare carriage return in a header",
        "a header of 1 MB",
    ],
)
async def test_a_mangled_request_harms_nobody(service: FakeService, request_bytes: bytes) -> None:
    async with served(edge_app(service, body_timeout_s=0.5)) as address:
        mangled = await Connection.open(address)
        mangled.writer.write(request_bytes)
        mangled.writer.write_eof()
        try:
            answer = await asyncio.wait_for(mangled.reader.read(), 20)
        except ConnectionResetError:
            answer = b""
        assert not answer.startswith(b"HTTP/1.1 5")
        good = await Connection.open(address)
        await good.head(f"content-length: {len(GOOD)}")
        await good.send(GOOD)
        assert (await good.response()).status == 200


FIELDS = (
    "inputs",
    "input",
    "model",
    "truncate",
    "truncation_direction",
    "prompt_name",
    "normalize",
    "dimensions",
    "parameters",
    "encoding_format",
    "user",
    "source_sentence",
    "sentences",
    "text",
    "text_pair",
    "question",
    "context",
    "query",
    "texts",
    "documents",
    "top_n",
    "ids",
    "prompt",
    "messages",
    "role",
    "content",
    "stop",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "logprobs",
    "max_tokens",
    "stream",
    "stream_options",
    "candidate_labels",
    "hypothesis_template",
    "aggregation_strategy",
    "targets",
    "generate_parameters",
    "long_texts",
    "stride",
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["tiny", "left", "Right", "query", "base64", "float", ""]),
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner),
    max_leaves=12,
)
BODY_OBJECTS = st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=8)


@settings(max_examples=300)
@given(path=st.sampled_from(POSTS), body=BODY_OBJECTS)
def test_no_json_object_is_too_much(path: str, body: dict[str, Any]) -> None:
    assert _status(concrete(path), json.dumps(body).encode()) < 500


@settings(max_examples=300)
@given(task=st.sampled_from(sorted(BODIES)), body=BODY_OBJECTS)
def test_no_json_object_is_too_much_for_any_task(task: str, body: dict[str, Any]) -> None:
    assert _status(f"/models/{task}", json.dumps(body).encode()) < 500


@settings(max_examples=300)
@given(path=st.sampled_from(POSTS), data=st.data())
def test_no_mangled_example_is_too_much(path: str, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(example_of(path)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not raw:
            break
    assert _status(concrete(path), bytes(raw)) < 500


APP = edge_app(FakeService("tiny", *BODIES, tasks={task: task for task in BODIES}))


def _status(path: str, body: bytes) -> int:
    async def post() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://edge") as client:
            return (await client.post(path, content=body)).status_code

    return asyncio.run(post())

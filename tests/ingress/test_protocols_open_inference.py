"""The Open Inference Protocol's shapes, task by task, over a service that needs no Ray."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from serve_app import errors
from serve_app.config import IngressSettings
from serve_app.ingress.door import Door
from serve_app.ingress.protocols.open_inference import messages, unsupported
from serve_app.ingress.protocols.open_inference.grpc import OpenInference, OpenInferenceMethods, Unreadable, code_of
from serve_app.ingress.protocols.open_inference.tasks import TASK_TENSORS
from serve_app.ingress.routes import Route
from serve_app.ingress.service import SettingsRef
from serve_app.ingress.statuses import STATUSES
from serve_app.options import EmbeddingOptions, TokenClassificationOptions
from serve_app.tasks.generation import GENERATING
from serve_app.tasks.registry import ANSWERED_BY, TASKS
from tests.ingress.edge import WORDS, FakeService, client_of, vector

URL = "/v2/models/tiny/infer"
TEXTS = ["What is Deep Learning?", "naïve café ☕ 你好"]


def bytes_tensor(name: str, *texts: str) -> dict[str, Any]:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}


def body_of(*inputs: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), "parameters": parameters}


def nested(value: Any, lists: int) -> Any:
    return value if not lists else [nested(value, lists - 1)]


def binary(*texts: str) -> bytes:
    return b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in texts)


async def asked(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def outputs_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """By name, in their shapes."""
    return {
        each["name"]: np.array(each["data"], object if each["datatype"] == "BYTES" else None).reshape(each["shape"])
        for each in answer["outputs"]
    }


async def test_texts_are_embedded(client: httpx.AsyncClient) -> None:
    answer = await asked(client, {"id": "7", **body_of(bytes_tensor("text", *TEXTS))})
    assert {name: answer[name] for name in ("model_name", "model_version", "id")} == {
        "model_name": "tiny",
        "model_version": "1",
        "id": "7",
    }
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("embedding", "FP32", [2, 16])
    np.testing.assert_allclose(outputs_of(answer)["embedding"], np.stack([vector(text) for text in TEXTS]), atol=1e-6)


async def test_token_ids_are_taken_in_the_place_of_texts(client: httpx.AsyncClient, service: FakeService) -> None:
    ids = {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": [[101, 7, 102], [101, 8, 102]]}
    assert (await asked(client, body_of(ids)))["outputs"][0]["shape"] == [2, 16]
    assert service.requests[-1].inputs == ((101, 7, 102), (101, 8, 102))


async def test_binary_tensors_are_the_same_numbers_as_json(client: httpx.AsyncClient) -> None:
    raw = binary(*TEXTS)
    described = {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps(body_of(described, binary_data_output=True)).encode()
    headers = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
    response = await client.post(URL, content=header + raw, headers=headers)
    assert response.status_code == 200, response.text
    length = int(response.headers["inference-header-content-length"])
    assert response.headers["content-type"] == "application/octet-stream"
    (output,) = json.loads(response.content[:length])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(response.content) - length
    got = np.frombuffer(response.content[length:], "<f4").reshape(output["shape"])
    plain = outputs_of(await asked(client, body_of(bytes_tensor("text", *TEXTS))))["embedding"]
    np.testing.assert_array_equal(got, plain.astype(np.float32))


async def test_each_output_may_be_binary_or_not(service: FakeService) -> None:
    service.task = "text-classification"
    outputs = [{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}]
    async with client_of(service) as client:
        response = await client.post(URL, json={**body_of(bytes_tensor("text", *TEXTS)), "outputs": outputs})
    length = int(response.headers["inference-header-content-length"])
    score, label = json.loads(response.content[:length])["outputs"]
    assert label["data"] == ["POSITIVE", "NEGATIVE"] * 2
    assert np.frombuffer(response.content[length:], "<f4").reshape(score["shape"]).tolist() == [[0.75, 0.25]] * 2


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "embedding": (body_of(bytes_tensor("text", *TEXTS), normalize=True, dimensions=8), {"embedding": (2, 8)}),
    "similarity": (
        body_of(bytes_tensor("source_sentence", "a"), bytes_tensor("sentences", "b", "c"), task="similarity"),
        {"similarity": (2,)},
    ),
    "token-embedding": (
        body_of(bytes_tensor("text", *TEXTS), task="token-embedding"),
        {"token_embedding": (6, 16), "offsets": [0, 3, 6]},
    ),
    "sparse-embedding": (
        body_of(bytes_tensor("text", *TEXTS)),
        {"indices": [3, 70, 3, 70], "values": [0.5, 1.5, 0.5, 1.5], "offsets": [0, 2, 4]},
    ),
    "text-classification": (
        body_of(bytes_tensor("text", *TEXTS), bytes_tensor("text_pair", *TEXTS), top_k=1),
        {"label": [["POSITIVE"], ["POSITIVE"]], "score": [[0.75], [0.75]]},
    ),
    "rerank": (
        body_of(bytes_tensor("query", "q"), bytes_tensor("documents", "a", "b", "c")),
        {"score": [0, 0.125, 0.25]},
    ),
    "zero-shot-classification": (
        body_of(bytes_tensor("text", "a"), bytes_tensor("candidate_labels", "x", "y"), multi_label=True),
        {"label": [["x", "y"]], "score": [[0.5, 0.5]]},
    ),
    "token-classification": (
        body_of(bytes_tensor("text", "a"), bytes_tensor("ignore_labels", "O", "LOC"), aggregation_strategy="simple"),
        {"entities": ['[{"label":"PER","score":0.9,"word":"sarah","start":11,"end":16,"index":null}]']},
    ),
    "fill-mask": (
        body_of(bytes_tensor("text", "the [MASK]"), bytes_tensor("targets", "capital"), top_k=1),
        {"fills": ['[[{"score":0.5,"token":7,"token_str":"capital","sequence":"the capital"}]]']},
    ),
    "question-answering": (
        body_of(bytes_tensor("question", "Who?"), bytes_tensor("context", "Sarah.")),
        {"answers": ['[{"answer":"London","score":0.9,"start":3,"end":9}]']},
    ),
    **{
        task: (
            body_of(bytes_tensor("text", "a"), max_new_tokens=4, temperature=0, stop="x"),
            {"generated_text": ["".join(WORDS)], "finish_reason": ["length"]},
        )
        for task in sorted(GENERATING)
    },
}


def test_every_task_has_its_tensors() -> None:
    assert set(TASK_TENSORS) == set(ASKED) == set(TASKS) | set(GENERATING)


@pytest.mark.parametrize("task", ASKED)
async def test_a_task_gives_what_its_metadata_tells(task: str, service: FakeService) -> None:
    body, expected = ASKED[task]
    service.task = next(served for served, answered in ANSWERED_BY.items() if task in answered)
    async with client_of(service) as client:
        answer = await asked(client, {**body, "parameters": {**body["parameters"], "task": task}})
    assert service.requests[-1].task == task
    for name, values in outputs_of(answer).items():
        if isinstance(expected[name], tuple):
            assert values.shape == expected[name]
        else:
            assert values.tolist() == expected[name]
    for told, given in zip(TASK_TENSORS[task].outputs, answer["outputs"], strict=True):
        assert (told.name, told.datatype, len(told.shape)) == (given["name"], given["datatype"], len(given["shape"]))
        assert all(size in (-1, got) for size, got in zip(told.shape, given["shape"], strict=True))


@pytest.mark.parametrize("task", sorted(ANSWERED_BY))
async def test_a_request_made_of_metadata_alone_is_a_good_one(task: str, service: FakeService) -> None:
    service.task = task
    async with client_of(service) as client:
        told = (await client.get("/v2/models/tiny")).json()
        inputs = [bytes_tensor(each["name"], *["a text"] * abs(each["shape"][0])) for each in told["inputs"]]
        answer = await asked(client, {"inputs": inputs})
    assert [each["name"] for each in answer["outputs"]] == [each["name"] for each in told["outputs"]]


async def test_parameters_become_options(client: httpx.AsyncClient, service: FakeService) -> None:
    body = body_of(
        bytes_tensor("text", "a"), normalize=False, truncate=False, truncation_direction="left", sequence_id=3
    )
    await asked(client, body)
    request = service.requests[-1]
    assert (request.long_texts, request.truncation_side) == ("error", "left")
    assert request.options.normalize is False  # type: ignore[union-attr]


BAD: dict[str, tuple[Any, str]] = {
    "no inputs": ({"inputs": []}, "inputs"),
    "unknown input": (body_of(bytes_tensor("secret", "a")), "it takes: text"),
    "an input twice": (body_of(bytes_tensor("text", "a"), bytes_tensor("text", "b")), "same name"),
    "missing input": (body_of({"name": "input_ids", "shape": [0], "datatype": "INT32", "data": []}), "empty"),
    "wrong shape": (body_of({**bytes_tensor("text", "a"), "shape": [2]}), "shape"),
    "huge shape": (body_of({**bytes_tensor("text", "a"), "shape": [2**31 - 1] * 8}), "shape"),
    "many dimensions": (
        body_of({**bytes_tensor("text", "a"), "shape": [1] * 9}),
        "`inputs[0].shape` has more than the 8 items",
    ),
    "wrong datatype": (body_of({**bytes_tensor("text", "a"), "datatype": "FP32"}), "BYTES"),
    "numbers as texts": (body_of({**bytes_tensor("text", "a"), "data": [1]}), "not all texts"),
    "texts as numbers": (body_of({**bytes_tensor("input_ids", "a"), "datatype": "INT64"}), "whole numbers"),
    "unknown parameter": (body_of(bytes_tensor("text", "a"), top_k=3), "`parameters.top_k`: is not supported here"),
    "no data": (body_of({"name": "text", "shape": [1], "datatype": "BYTES"}), "data"),
    "binary data missing": (
        body_of({"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}),
        "shape",
    ),
    "unknown output": ({**body_of(bytes_tensor("text", "a")), "outputs": [{"name": "logits"}]}, "it gives: embedding"),
    "an output twice": (
        {**body_of(bytes_tensor("text", "a")), "outputs": [{"name": "embedding"}] * 2},
        "name each output once",
    ),
    "many outputs": (
        {**body_of(bytes_tensor("text", "a")), "outputs": [{"name": "embedding"}] * 17},
        "`outputs` has more than the 16 items",
    ),
    "deep data": (body_of({**bytes_tensor("text", "a"), "data": nested("a", 10)}), "in more than 8 lists"),
    "deep data beside flat": (
        body_of({**bytes_tensor("input_ids", ""), "datatype": "INT32", "data": [1, 2, nested(3, 10)]}),
        "in more than 8 lists",
    ),
    "unknown task": (body_of(bytes_tensor("text", "a"), task="divination"), "names no task"),
    "wrong parameter": (body_of(bytes_tensor("text", "a"), normalize="yes"), "parameters.normalize"),
    "shared memory": (
        body_of({**bytes_tensor("text", "a"), "parameters": {"shared_memory_region": "r"}}),
        "shared memory",
    ),
    "not an object": ([], "object"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_wrong_request_is_refused_in_words(case: str, client: httpx.AsyncClient) -> None:
    body, words = BAD[case]
    response = await client.post(URL, json=body)
    assert 400 <= response.status_code < 500
    assert words in response.json()["error"]
    assert "secret" not in response.text


async def test_data_may_stand_in_lists_of_lists_of_any_shape(client: httpx.AsyncClient, service: FakeService) -> None:
    data = [[1, 2], [3], nested(4, 7), 5, 6]
    await asked(client, body_of({"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": data}))
    assert service.requests[-1].inputs == ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize("length", ["-1", "x", "9999999", "1" * 5000, "0"])
async def test_a_wrong_header_length_is_refused(length: str, client: httpx.AsyncClient) -> None:
    response = await client.post(
        URL, json=body_of(bytes_tensor("text", "a")), headers={"inference-header-content-length": length}
    )
    assert response.status_code == 400


@pytest.mark.parametrize("raw", [b"\1", b"\xff\xff\xff\xffa", b"\1\0\0\0\xff", b"\4\0\0\0abc"], ids=repr)
async def test_wrong_binary_texts_are_refused(raw: bytes, client: httpx.AsyncClient) -> None:
    described = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps(body_of(described)).encode()
    response = await client.post(
        URL, content=header + raw, headers={"inference-header-content-length": str(len(header))}
    )
    assert response.status_code == 400


async def test_the_bytes_behind_the_json_count_for_the_limit(service: FakeService) -> None:
    raw = binary("a" * 2000)
    header = json.dumps(body_of({**bytes_tensor("text", "a"), "data": None})).encode()
    async with client_of(service, max_body_bytes=1000) as client:
        response = await client.post(
            URL, content=header + raw, headers={"inference-header-content-length": str(len(header))}
        )
    assert response.status_code == 413


async def test_limits_hold_as_everywhere(service: FakeService) -> None:
    async with client_of(service, max_client_batch_size=1) as client:
        response = await client.post(URL, json=body_of(bytes_tensor("text", *TEXTS)))
    assert (response.status_code, response.json()["code"]) == (422, "batch_too_large")


async def test_what_the_server_tells_of_itself(client: httpx.AsyncClient, service: FakeService) -> None:
    assert (await client.get("/v2")).json()["extensions"] == ["binary_tensor_data", "parameters"]
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await client.get("/v2/models/tiny/versions/1/ready")).json() == {"name": "tiny", "ready": True}
    service.unready = "starting"
    assert (await client.get("/v2/health/ready")).status_code == 503
    assert (await client.get("/v2/health/live")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v2/models/absent", "/v2/models/absent/ready", "/v2/models/tiny/versions/2", "/v2/x"]
)
async def test_what_is_not_there_is_not_found_in_the_protocols_shape(path: str, client: httpx.AsyncClient) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert isinstance(response.json()["error"], str)
    assert "error_type" not in response.json()


IDS = {"name": "input_ids", "shape": [2, 4], "datatype": "INT64", "data": [[5, 6, 0, 0], [7, 8, 9, 4]]}


def mask_of(*rows: list[int], **keys: Any) -> dict[str, Any]:
    return {"name": "attention_mask", "shape": [len(rows), len(rows[0])], "datatype": "INT64", "data": rows, **keys}


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        (([1, 1, 0, 0], [1, 1, 1, 1]), ((5, 6), (7, 8, 9, 4))),
        (([0, 1, 0, 0], [0, 0, 1, 1]), ((6,), (9, 4))),
    ],
)
async def test_a_mask_leaves_padding_out(client: httpx.AsyncClient, service: FakeService, rows: Any, left: Any) -> None:
    response = await client.post("/v2/models/tiny/infer", json=body_of(IDS, mask_of(*rows)))
    assert response.status_code == 200, response.text
    assert service.requests[0].inputs == left


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((IDS, mask_of([1, 0, 1, 0], [1, 1, 1, 1])), "row 0 has a 0 between"),
        ((IDS, mask_of([0, 0, 0, 0], [1, 1, 1, 1])), "row 0 masks every token"),
        ((IDS, mask_of([2, 1, 0, 0], [1, 1, 1, 1])), "0 and 1 only"),
        ((IDS, mask_of([1, 1, 1, 1])), "another shape"),
        ((IDS, bytes_tensor("attention_mask", *"11111111") | {"shape": [2, 4]}), "0 and 1 only"),
        ((bytes_tensor("text", "a"), mask_of([1])), "goes with input_ids"),
    ],
)
async def test_a_mask_that_is_none_is_refused(client: httpx.AsyncClient, inputs: Any, said: str) -> None:
    response = await client.post("/v2/models/tiny/infer", json=body_of(*inputs))
    assert response.status_code in (400, 422)
    assert said in response.json()["error"]


@pytest.mark.parametrize("route", unsupported.routes(), ids=lambda route: f"{route.method} {route.path}")
async def test_what_is_tritons_own_is_not_found_and_says_so(client: httpx.AsyncClient, route: Route) -> None:
    response = await client.request(route.method, route.path.replace("{name}", "tiny"))
    assert response.status_code == 404
    assert set(response.json()) == {"error", "code", "request_id"}
    assert response.json()["error"].startswith("this server does not support ")


class Context:
    """What Serve hands to a method of the gRPC service."""

    def __init__(self, **metadata: str) -> None:
        self.metadata = tuple(metadata.items())
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None:
        self.trailing = dict(metadata)


class Servicer(OpenInferenceMethods):
    """As the ingress has them."""

    def __init__(self, service: FakeService, guard: Any = None, **settings: float) -> None:
        self.open_inference = OpenInference(service, SettingsRef(IngressSettings.model_validate(settings)), Door(guard))


def request_of(*texts: str, name: str = "text", typed: bool = False, **parameters: Any) -> Any:
    request = messages.ModelInferRequest(model_name="tiny", id="7")
    tensor = request.inputs.add(name=name, datatype="BYTES", shape=[len(texts)])
    if typed:
        tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    else:
        request.raw_input_contents.append(binary(*texts))
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(request.parameters[key], kind, value)
    return request


@pytest.mark.parametrize("typed", [False, True])
async def test_a_grpc_call_gives_the_same_numbers(typed: bool, service: FakeService) -> None:
    context = Context()
    answer = await Servicer(service).ModelInfer(request_of(*TEXTS, typed=typed, normalize=False), context)
    assert (context.code, answer.id, answer.model_name) == (grpc.StatusCode.OK, "7", "tiny")
    (output,) = answer.outputs
    got = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(output.shape)
    np.testing.assert_allclose(got, np.stack([vector(text) for text in TEXTS]), atol=1e-6)


async def test_token_ids_come_typed_too(service: FakeService) -> None:
    request = messages.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="input_ids", datatype="INT32", shape=[1, 2]).contents.int_contents.extend([5, 6])
    await Servicer(service).ModelInfer(request, Context())
    assert service.requests[-1].inputs == ((5, 6),)


@pytest.mark.parametrize(
    "failure", [cls("what went wrong") for cls in STATUSES], ids=lambda error: type(error).__name__
)
async def test_an_error_of_a_grpc_call_is_its_status(failure: errors.ServeAppError, service: FakeService) -> None:
    service.failure = failure
    context = Context()
    await Servicer(service).ModelInfer(request_of("a"), context)
    assert (context.code, context.details) == (code_of(failure), "what went wrong")
    assert context.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)


async def test_an_unexpected_error_tells_nothing_of_itself(service: FakeService) -> None:
    service.failure = RuntimeError("the secret")
    context = Context()
    await Servicer(service).ModelInfer(request_of("a"), context)
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.details


async def test_a_grpc_message_is_bounded_as_a_body(service: FakeService) -> None:
    context = Context()
    await Servicer(service, max_body_bytes=1000).ModelInfer(request_of("a" * 2000), context)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("name", ["classification", "shared_memory_byte_size"])
@pytest.mark.parametrize("where", ["inputs", "outputs"])
async def test_extensions_that_are_not_served_are_refused_as_over_http(
    service: FakeService, where: str, name: str
) -> None:
    request, context = request_of("a"), Context()
    request.outputs.add(name="embedding")
    getattr(request, where)[0].parameters[name].int64_param = 3
    await Servicer(service).ModelInfer(request, context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "not supported" in context.details
    assert service.requests == []


async def test_an_output_named_twice_is_refused_over_grpc_too(service: FakeService) -> None:
    request = request_of("a")
    for _ in range(1000):
        request.outputs.add(name="embedding")
    context = Context()
    await Servicer(service).ModelInfer(request, context)
    assert (context.code, service.requests) == (grpc.StatusCode.INVALID_ARGUMENT, [])
    assert "name each output once" in context.details


async def test_a_late_answer_is_cancelled(service: FakeService) -> None:
    service.go.clear()
    context = Context()
    await Servicer(service, request_timeout_s=0.05).ModelInfer(request_of("a"), context)
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert service.cancelled.is_set()


async def stream_of(*requests: Any) -> Any:
    for request in requests:
        yield request


async def streamed(service: FakeService, *requests: Any, **settings: float) -> list[Any]:
    return [each async for each in Servicer(service, **settings).ModelStreamInfer(stream_of(*requests), Context())]


async def test_generated_text_is_streamed_in_pieces(service: FakeService) -> None:
    service.task = "text-generation"
    responses = [each.infer_response for each in await streamed(service, request_of("a", max_new_tokens=4))]
    texts = [each.raw_output_contents[0][4:].decode() for each in responses]
    reasons = [each.raw_output_contents[1][4:].decode() for each in responses]
    assert texts == [*WORDS, ""]
    assert reasons == ["", "", "", "", "stop"]
    assert {each.id for each in responses} == {"7"}


async def test_a_failed_request_does_not_end_the_stream(service: FakeService) -> None:
    failed, answered = await streamed(service, request_of("a", name="nonsense"), request_of("a"))
    assert "it takes" in failed.error_message
    assert failed.infer_response.id == "7"
    assert answered.error_message == ""
    assert answered.infer_response.outputs[0].name == "embedding"


async def test_a_stream_that_takes_too_long_is_cancelled(service: FakeService) -> None:
    service.task = "text-generation"
    service.go.clear()
    *_, last = await streamed(service, request_of("a"), request_timeout_s=0.05)
    assert "time ran out" in last.error_message
    assert service.cancelled.is_set()


async def test_what_the_grpc_service_tells(service: FakeService) -> None:
    servicer = Servicer(service)
    assert (await servicer.ServerLive(messages.ServerLiveRequest(), Context())).live
    assert (await servicer.ServerReady(messages.ServerReadyRequest(), Context())).ready
    assert (await servicer.ModelReady(messages.ModelReadyRequest(name="tiny"), Context())).ready
    assert not (await servicer.ModelReady(messages.ModelReadyRequest(name="absent"), Context())).ready
    assert (await servicer.ServerMetadata(messages.ServerMetadataRequest(), Context())).name == "serve-app"
    told = await servicer.ModelMetadata(messages.ModelMetadataRequest(name="tiny"), Context())
    assert [(each.name, each.datatype, list(each.shape)) for each in told.inputs] == [("text", "BYTES", [-1])]
    context = Context()
    await servicer.ModelMetadata(messages.ModelMetadataRequest(name="absent"), context)
    assert context.code is grpc.StatusCode.NOT_FOUND


class OneKey:
    """A guard, and the account of the one key that it knows."""

    priority = "interactive"

    def __init__(self) -> None:
        self.requests = self.tokens = 0

    def admit(self, headers: Mapping[bytes, bytes], role: str) -> OneKey:
        if headers.get(b"authorization") != b"Bearer k":
            raise errors.RequestError("send a key")
        return self

    def enter(self) -> None:
        self.requests += 1

    def charge(self, tokens: int) -> None:
        self.tokens += tokens

    reserve = charge


async def test_a_guard_is_asked_for_every_call_that_costs_or_tells(service: FakeService) -> None:
    guard = OneKey()
    servicer = Servicer(service, guard)
    for call in (
        lambda context: servicer.ModelInfer(request_of("a"), context),
        lambda context: servicer.ModelMetadata(messages.ModelMetadataRequest(name="tiny"), context),
        lambda context: servicer.ServerMetadata(messages.ServerMetadataRequest(), context),
    ):
        context = Context()
        await call(context)
        assert context.details == "send a key"
    context = Context()
    assert [each async for each in servicer.ModelStreamInfer(stream_of(request_of("a")), context)] == []
    assert context.details == "send a key"
    assert not service.requests
    assert (await servicer.ServerLive(messages.ServerLiveRequest(), Context())).live


async def test_what_a_call_costs_is_charged(service: FakeService) -> None:
    guard = OneKey()
    context = Context(authorization="Bearer k")
    await Servicer(service, guard).ModelInfer(request_of("abc"), context)
    assert (context.code, guard.requests, guard.tokens) == (grpc.StatusCode.OK, 1, 5)
    service.task = "text-generation"
    async for _ in Servicer(service, guard).ModelStreamInfer(stream_of(request_of("abc")), context):
        pass
    assert (guard.requests, guard.tokens) == (2, 5 + 6 + 5)


def test_messages_cross_process_borders() -> None:
    request = request_of("a", normalize=True)
    assert pickle.loads(pickle.dumps(request)) == request
    assert pickle.loads(pickle.dumps(Unreadable())) == Unreadable()


async def test_what_other_clients_say_beside_is_no_option(client: httpx.AsyncClient, service: FakeService) -> None:
    """KServe's name the model again, MLServer's the kind of content, Triton's how its queue is to treat the request."""
    tensor = {**bytes_tensor("text", "a"), "parameters": {"content_type": "str"}}
    hints = {"sequence_id": 3, "sequence_start": True, "priority": 1, "timeout": 5, "content_type": "str"}
    body = {"inputs": [tensor], "parameters": hints, "model_name": "tiny"}
    response = await client.post("/v2/models/tiny/infer", json=body)
    assert response.status_code == 200, response.text
    assert service.requests[-1].options == EmbeddingOptions()
    async with client_of(FakeService("tiny", "other")) as several:
        refused = await several.post("/v2/models/tiny/infer", json={**body, "model_name": "other"})
    assert refused.status_code == 404


async def test_lists_are_parameters_over_http_too() -> None:
    service = FakeService(task="token-classification")
    async with client_of(service) as client:
        for body in (
            body_of(bytes_tensor("text", "a"), ignore_labels=["O", "MISC"]),
            body_of(bytes_tensor("text", "a"), bytes_tensor("ignore_labels", "O", "MISC")),
        ):
            response = await client.post("/v2/models/tiny/infer", json=body)
            assert response.status_code == 200, response.text
            assert service.requests[-1].options == TokenClassificationOptions(ignore_labels=("O", "MISC"))

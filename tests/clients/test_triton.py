"""tritonclient over HTTP and gRPC, sync and async: binary tensors, as it sends them by default, and JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from serve_app.config import IngressSettings
from serve_app.ingress.door import Door
from serve_app.ingress.protocols.open_inference import health, messages
from serve_app.ingress.protocols.open_inference.grpc import OpenInference, OpenInferenceMethods, add_to_server
from serve_app.ingress.service import SettingsRef
from tests.clients.answers import TEXTS, assert_same, plain
from tests.ingress.edge import WORDS, FakeService, edge_app, served_in_thread
from tests.live import Live

Client: TypeAlias = Any
"""Its two kinds have the same methods, and no common class that has them."""


MESSAGES = [("grpc.max_receive_message_length", 2**28)]
"""As serve_config.yaml has it."""


class Servicer(OpenInferenceMethods):
    def __init__(self, service: FakeService) -> None:
        self.open_inference = OpenInference(service, SettingsRef(IngressSettings()), Door())


@contextlib.contextmanager
def grpc_edge(task: str = "embedding") -> Iterator[str]:
    """Address of a real gRPC server in a thread, over a service that needs no Ray."""
    ready: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        server, ended = grpc.aio.server(options=MESSAGES), asyncio.Event()
        add_to_server(Servicer(FakeService(task=task)), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.put((f"127.0.0.1:{port}", asyncio.get_running_loop(), ended))
        await ended.wait()
        await server.stop(None)

    thread = threading.Thread(daemon=True, target=asyncio.run, args=(serve(),), name="grpc-edge")
    thread.start()
    address, loop, ended = ready.get(timeout=30)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()


@pytest.fixture
def grpc_address(base_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of the same server as `base_url`."""
    if request.node.callspec.params["base_url"] == "edge":
        with grpc_edge() as address:
            yield address
    else:
        running: Live = request.getfixturevalue("live")
        yield running.grpc_address


@pytest.fixture(params=["http", "grpc"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def package(kind: str) -> Any:
    return triton_http if kind == "http" else triton_grpc


@pytest.fixture
def client(kind: str, base_url: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    address = base_url.removeprefix("http://") if kind == "http" else request.getfixturevalue("grpc_address")
    package = triton_http if kind == "http" else triton_grpc
    with package.InferenceServerClient(address) as client:
        yield client


def texts(package: Any, name: str, values: list[str], **options: Any) -> Any:
    tensor = package.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode() for value in values], object), **options)
    return tensor


def test_the_server_tells_of_itself(client: Client, model: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert client.is_model_ready(model, "1")
    assert not client.is_model_ready("absent")


def test_metadata_tells_the_models_tensors(client: Client, kind: str, model: str) -> None:
    if kind == "http":
        server, told = client.get_server_metadata(), client.get_model_metadata(model)
    else:
        server, told = (
            client.get_server_metadata(as_json=True),
            client.get_model_metadata(model, "1", as_json=True),
        )
    assert server["name"] == "serve-app"
    assert "binary_tensor_data" in server["extensions"]
    assert (told["name"], told["versions"]) == (model, ["1"])
    assert [(each["name"], each["datatype"]) for each in told["inputs"]] == [("text", "BYTES")]
    assert [(each["name"], each["datatype"]) for each in told["outputs"]] == [("embedding", "FP32")]


def test_texts_are_embedded(client: Client, package: Any, base_url: str, model: str) -> None:
    answer = client.infer(model, [texts(package, "text", TEXTS)], request_id="7", parameters={"normalize": True})
    assert_same(answer.as_numpy("embedding"), plain(base_url, TEXTS, normalize=True))
    response = answer.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "7"


def test_json_tensors_are_the_same_numbers(base_url: str, model: str) -> None:
    with triton_http.InferenceServerClient(base_url.removeprefix("http://")) as client:
        wanted = [triton_http.InferRequestedOutput("embedding", binary_data=False)]
        answer = client.infer(model, [texts(triton_http, "text", TEXTS, binary_data=False)], outputs=wanted)
    assert_same(answer.as_numpy("embedding"), plain(base_url, TEXTS, normalize=None))


def test_token_ids_are_taken(client: Client, package: Any, base_url: str, model: str) -> None:
    ids = np.array([[101, 7592, 102], [101, 2088, 102]], np.int32)
    tensor = package.InferInput("input_ids", ids.shape, "INT32")
    tensor.set_data_from_numpy(ids)
    wanted = [package.InferRequestedOutput("embedding")]
    answer = client.infer(model, [tensor], outputs=wanted, parameters={"normalize": True})
    assert_same(answer.as_numpy("embedding"), plain(base_url, ids.tolist(), normalize=True))


def test_padding_that_a_mask_tells_is_left_out(client: Client, package: Any, base_url: str, model: str) -> None:
    ids, mask = np.array([[101, 7592, 102, 0], [101, 102, 0, 0]], np.int64), np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    tensors = []
    for name, values in (("input_ids", ids), ("attention_mask", mask)):
        tensors.append(package.InferInput(name, values.shape, "INT64"))
        tensors[-1].set_data_from_numpy(values)
    answer = client.infer(model, tensors, parameters={"normalize": True})
    assert_same(answer.as_numpy("embedding"), plain(base_url, [[101, 7592, 102], [101, 102]]))


def test_classes_of_an_output_are_refused(client: Client, package: Any, model: str) -> None:
    wanted = [package.InferRequestedOutput("embedding", class_count=3)]
    with pytest.raises(InferenceServerException, match="not supported"):
        client.infer(model, [texts(package, "text", ["a"])], outputs=wanted)


def test_extensions_of_tritons_are_refused_over_http(base_url: str, model: str) -> None:
    with triton_http.InferenceServerClient(base_url.removeprefix("http://")) as client:
        for ask in (
            client.get_model_repository_index,
            client.get_inference_statistics,
            lambda: client.get_inference_statistics(model),
            lambda: client.get_model_config(model),
            client.get_system_shared_memory_status,
        ):
            with pytest.raises(InferenceServerException, match="does not support"):
                ask()


def test_another_task_of_the_model_is_asked_by_its_name(client: Client, package: Any, model: str) -> None:
    inputs = [texts(package, "source_sentence", ["a cat"]), texts(package, "sentences", ["a kitten", "the market"])]
    answer = client.infer(model, inputs, parameters={"task": "similarity"})
    assert answer.as_numpy("similarity").shape == (2,)


def test_refusals_are_the_clients_own_errors(client: Client, package: Any, model: str) -> None:
    with pytest.raises(InferenceServerException, match="no model of that name"):
        client.infer("absent", [texts(package, "text", ["a"])])
    with pytest.raises(InferenceServerException, match="it takes: text"):
        client.infer(model, [texts(package, "logits", ["a"])])
    with pytest.raises(InferenceServerException, match="dimensions"):
        client.infer(model, [texts(package, "text", ["a"])], parameters={"dimensions": 100_000})
    with pytest.raises(InferenceServerException, match="larger than the"):
        client.infer(model, [texts(package, "text", ["a" * 10_500_000])])
    assert client.infer(model, [texts(package, "text", ["a"])]).as_numpy("embedding").shape[0] == 1


def test_calls_may_be_answered_in_the_background(client: Client, kind: str, model: str) -> None:
    if kind == "http":
        answer = client.async_infer(model, [texts(triton_http, "text", ["a"])]).get_result()
    else:
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            model, [texts(triton_grpc, "text", ["a"])], callback=lambda result, error: answers.put(error or result)
        )
        answer = answers.get(timeout=60)
    assert answer.as_numpy("embedding").shape[0] == 1


async def test_the_async_http_client_gets_the_same(base_url: str, model: str) -> None:
    async with triton_http_aio.InferenceServerClient(base_url.removeprefix("http://")) as client:
        assert await client.is_model_ready(model)
        answer = await client.infer(model, [texts(triton_http, "text", TEXTS)], parameters={"normalize": True})
        with pytest.raises(InferenceServerException, match="it takes: text"):
            await client.infer(model, [texts(triton_http, "logits", ["a"])])
    assert_same(answer.as_numpy("embedding"), plain(base_url, TEXTS, normalize=True))


async def test_the_async_grpc_client_gets_the_same(base_url: str, grpc_address: str, model: str) -> None:
    async with triton_grpc_aio.InferenceServerClient(grpc_address) as client:
        assert await client.is_model_ready(model)
        answer = await client.infer(model, [texts(triton_grpc, "text", TEXTS)], parameters={"normalize": True})
        with pytest.raises(InferenceServerException, match="it takes: text"):
            await client.infer(model, [texts(triton_grpc, "logits", ["a"])])
    assert_same(answer.as_numpy("embedding"), plain(base_url, TEXTS, normalize=True))


async def test_a_grpc_stream_answers_each_request(grpc_address: str, model: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for index, name in enumerate(("text", "logits", "text")):
            yield {"model_name": model, "inputs": [texts(triton_grpc, name, ["a"])], "request_id": str(index)}

    async with triton_grpc_aio.InferenceServerClient(grpc_address) as client:
        answers = [answer async for answer in client.stream_infer(requests())]
    assert [error is None for _, error in answers] == [True, False, True]
    assert [result.get_response().id for result, error in answers if error is None] == ["0", "2"]


def test_grpcs_own_health_service_answers_beside_it(grpc_address: str, model: str) -> None:
    """With HAProxy and Serve between, where the application runs; test_frameworks.py has `grpcio-health-checking`."""
    with grpc.insecure_channel(grpc_address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        for name in ("", model):
            asked = health.HealthCheckRequest(service=name).SerializeToString()
            watched = watch(asked, timeout=60)
            for told in (check(asked, timeout=60), next(watched)):
                assert health.HealthCheckResponse.FromString(told).status == health.SERVING
            watched.cancel()
        with pytest.raises(grpc.RpcError) as refused:
            check(health.HealthCheckRequest(service="absent").SerializeToString(), timeout=60)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_generated_text_comes_in_pieces() -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_edge("text-generation") as address, triton_grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("tiny", [texts(triton_grpc, "text", ["Once"])], parameters={"max_new_tokens": 4})
        told: list[str] = []
        while True:
            result, error = answers.get(timeout=60)
            assert error is None
            told.append(result.as_numpy("generated_text")[0].decode())
            if result.as_numpy("finish_reason")[0]:
                break
        client.stop_stream()
    assert told == [*WORDS, ""]


def test_entities_are_json_texts() -> None:
    with (
        served_in_thread(edge_app(FakeService(task="token-classification"))) as url,
        triton_http.InferenceServerClient(url.removeprefix("http://")) as client,
    ):
        answer = client.infer("tiny", [texts(triton_http, "text", ["My name is Sarah"])])
    (entities,) = answer.as_numpy("entities")
    assert json.loads(entities)[0]["word"] == "sarah"


def test_messages_are_those_of_the_client() -> None:
    """Field by field; the client has messages of Triton's own beside them."""
    theirs = service_pb2.DESCRIPTOR
    ours = messages.ModelInferRequest.DESCRIPTOR.file
    for name, message in ours.message_types_by_name.items():
        assert fields(message) == fields(theirs.message_types_by_name[name])
    methods = theirs.services_by_name["GRPCInferenceService"].methods_by_name
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        same = methods[method.name]
        assert (method.input_type.full_name, method.output_type.full_name) == (
            same.input_type.full_name,
            same.output_type.full_name,
        )


def fields(message: Any) -> list[tuple[Any, ...]]:
    nested = [(each.name, fields(each)) for each in message.nested_types]
    return sorted(
        (f.number, f.name, f.type, f.message_type and f.message_type.full_name, str(nested)) for f in message.fields
    )

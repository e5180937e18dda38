"""Odd, wrong and broken gRPC calls get a status that tells what is wrong, and the next call is answered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from random import Random
from typing import Any

import grpc
import pytest

from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.protocols.open_inference.tasks import TASK_TENSORS
from serve_app.ingress.protocols.open_inference.tensors import INTEGERS
from tests.ingress.edge import FakeService
from tests.ingress.test_grpc_edge import called

SEED = 0
CALLS = 1500
STREAMS = 150
SERVICE = f"/{messages.SERVICE}"
CANARY = "canary-7"

WRONG = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
"""A bug of ours, one that nobody has seen to, and a service that is not there."""

TEXTS = ("a", "What is a replica?", "", " ", "\0", "[MASK] is blue", "ü" * 50, "\U0001f600", "a" * 5000, CANARY)
NAMES = tuple(
    sorted({each.name for tensors in TASK_TENSORS.values() for each in tensors.inputs} | {"input_ids", "", CANARY})
)
DATATYPES = ("BYTES", *INTEGERS, "FP32", "BOOL", "", CANARY)
SIZES = (0, 1, 2, 3, -1, 7, 2**31, 2**62, -(2**63))
PARAMETERS = ("task", "top_k", "normalize", "max_new_tokens", "long_texts", "stride", "seed", CANARY)


def bytes_of(random: Random) -> bytes:
    return random.randbytes(random.choice((0, 1, 3, 4, 5, 40, 300)))


def binary(random: Random) -> bytes:
    """Texts with their lengths before them, or what looks a little like it."""
    written = b"".join(
        len(text.encode()).to_bytes(4, "little") + text.encode()
        for text in random.choices(TEXTS, k=random.randint(0, 3))
    )
    return random.choice((written, written[:-1], bytes_of(random)))


def fill_contents(random: Random, contents: Any) -> None:
    kind = random.choice(("bytes", "bytes", "int", "int64", "uint", "uint64", "fp32", "bool"))
    count = random.randint(0, 3)
    values: dict[str, list[Any]] = {
        "bytes": [random.choice((*(text.encode() for text in TEXTS), b"\xff\xfe")) for _ in range(count)],
        "int": [random.choice((0, 5, -1, 2**31 - 1)) for _ in range(count)],
        "int64": [random.choice((0, 5, -(2**63), 2**63 - 1)) for _ in range(count)],
        "uint": [random.choice((0, 5, 2**32 - 1)) for _ in range(count)],
        "uint64": [random.choice((0, 5, 2**64 - 1)) for _ in range(count)],
        "fp32": [random.choice((0.0, float("nan"), float("inf"))) for _ in range(count)],
        "bool": [True] * count,
    }
    getattr(contents, f"{kind}_contents").extend(values[kind])


def fill_parameter(random: Random, parameter: Any) -> None:
    match random.randint(0, 4):
        case 0:
            parameter.bool_param = random.random() < 0.5
        case 1:
            parameter.int64_param = random.choice((0, 1, -1, 2**31, 2**63 - 1))
        case 2:
            parameter.string_param = random.choice((*TASK_TENSORS, *TEXTS, "windows"))
        case 3:
            parameter.double_param = random.choice((0.5, float("nan"), 1e308))


def message(random: Random) -> Any:
    """Often nearly good: a task's own tensors, one of them wrong or none."""
    task = random.choice(tuple(TASK_TENSORS))
    made = messages.ModelInferRequest(model_name=random.choice((*[task] * 18, "", CANARY)), id=random.choice(TEXTS))
    if random.random() < 0.05:
        made.model_version = random.choice(("1", "2", CANARY))
    names = [each.name for each in TASK_TENSORS[task].inputs]
    if random.random() < 0.1:
        names = random.choices(NAMES, k=random.choice((0, 1, 2, 20)))
    raw = random.random() < 0.5
    for name in names:
        good = random.random() < 0.85
        tensor = made.inputs.add(name=name, datatype="BYTES" if good else random.choice(DATATYPES))
        tensor.shape.extend([1] if good else random.choices(SIZES, k=random.choice((0, 1, 2, 9))))
        if raw:
            made.raw_input_contents.append(b"\1\0\0\0a" if good else binary(random))
        elif good:
            tensor.contents.bytes_contents.append(b"a [MASK] b")
        else:
            fill_contents(random, tensor.contents)
    for name in random.sample(PARAMETERS, k=random.choice((*[0] * 8, 1, 3))):
        fill_parameter(random, made.parameters[name])
    given = [each.name for each in TASK_TENSORS[task].outputs]
    for name in random.choices((*given, CANARY), k=random.choice((*[0] * 12, 1, 2, 40))):
        made.outputs.add(name=name)
    return made


def sent(random: Random) -> bytes:
    """A message, one of which some bytes are wrong, or no message."""
    if random.random() < 0.1:
        return bytes_of(random)
    raw = bytearray(message(random).SerializeToString())
    if random.random() < 0.2:
        for _ in range(random.randint(1, 4)):
            raw[random.randrange(len(raw))] = random.randrange(256) if raw else 0
    return bytes(raw[: random.randint(0, len(raw))] if random.random() < 0.05 else raw)


def metadata(random: Random) -> tuple[tuple[str, str], ...]:
    told = {"x-request-id": random.choice(("job-7", "a b", "x" * 500))}
    if random.random() < 0.1:
        told["x-request-timeout-ms"] = random.choice(("0", "-1", "9" * 40, "60000", CANARY))
    return tuple(told.items())


def good() -> bytes:
    made = messages.ModelInferRequest(model_name="embedding", raw_input_contents=[b"\1\0\0\0a"])
    made.inputs.add(name="text", datatype="BYTES", shape=[1])
    return bytes(made.SerializeToString())


@pytest.fixture
def service() -> FakeService:
    return FakeService(*TASK_TENSORS, tasks={task: task for task in TASK_TENSORS})


async def status_of(call: Callable[..., Any], raw: bytes, random: Random) -> tuple[grpc.StatusCode, str, bool]:
    """The call's status, what it says, and whether it has an id."""
    try:
        under_way = call(raw, metadata=metadata(random), timeout=60)
        await under_way
        return grpc.StatusCode.OK, "", True
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", "x-request-id" in dict(error.trailing_metadata() or ())


@pytest.mark.timeout(300)
async def test_no_call_is_an_error_that_nobody_meant(service: FakeService, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    async with called(service) as channel:
        infer = channel.unary_unary(f"{SERVICE}/ModelInfer")
        for number in range(CALLS):
            random = Random(f"{SEED} {number}")
            code, details, has_id = await status_of(infer, sent(random), random)
            assert code not in WRONG, (number, details)
            assert has_id, (number, code)
            assert CANARY not in details, number
            found.append(code)
            if code is not grpc.StatusCode.OK:
                assert await infer(good(), timeout=60), number
    assert found.count(grpc.StatusCode.OK) > CALLS / 5, "too few get as far as the models"
    assert found.count(grpc.StatusCode.INVALID_ARGUMENT) > CALLS / 5
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.timeout(300)
async def test_no_message_ends_a_stream(service: FakeService, caplog: pytest.LogCaptureFixture) -> None:
    async with called(service) as channel:
        streams = channel.stream_stream(
            f"{SERVICE}/ModelStreamInfer", response_deserializer=messages.ModelStreamInferResponse.FromString
        )
        for number in range(STREAMS):
            random = Random(f"{SEED} stream {number}")
            asked = [sent(random) for _ in range(random.randint(1, 8))]
            stream = streams(iter([*asked, good()]), metadata=metadata(random), timeout=60)
            answered = [response async for response in stream]
            assert await stream.code() is grpc.StatusCode.OK, (number, await stream.details())
            assert all(CANARY not in each.error_message for each in answered), number
            assert len(answered) > len(asked), number
            assert answered[-1].infer_response.model_name == "embedding", number
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("method", ["ServerReady", "ModelReady", "ModelMetadata", "ServerMetadata", "ServerLive"])
async def test_no_bytes_upset_the_other_methods(service: FakeService, method: str) -> None:
    async with called(service) as channel:
        call = channel.unary_unary(f"{SERVICE}/{method}")
        for number in range(100):
            random = Random(f"{SEED} {method} {number}")
            code, details, has_id = await status_of(call, bytes_of(random), random)
            assert code not in WRONG, (number, details)
            assert has_id

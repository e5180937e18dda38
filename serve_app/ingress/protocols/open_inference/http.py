"""The Open Inference Protocol v2 over HTTP, with Triton's binary tensors.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field

from serve_app import __version__
from serve_app.errors import MalformedRequestError, ServeAppError
from serve_app.ingress.body import parse_body, read_body
from serve_app.ingress.depth import check_nesting
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import JSON, Exchange, Header, Reply, while_connected
from serve_app.ingress.inference import choose_model, compute
from serve_app.ingress.protocols.fields import Body, documented
from serve_app.ingress.protocols.open_inference.call import (
    EXTENSIONS,
    MOST_TENSORS,
    VERSION,
    Call,
    headers_of,
    metadata,
    refuse_extensions,
)
from serve_app.ingress.protocols.open_inference.tensors import (
    MOST_DIMENSIONS,
    MOST_ELEMENTS,
    InputTensor,
    OutputTensor,
    TensorHeader,
    from_list,
    from_raw,
)
from serve_app.ingress.routes import COMPUTE_FAILURES, Route
from serve_app.ingress.statuses import ErrorKind

T = TypeVar("T")

OCTETS = b"application/octet-stream"
HEADER_LENGTH = b"inference-header-content-length"
_BINARY = (
    "Triton's binary tensors: the JSON, of as many bytes as the header `Inference-Header-Content-Length` says, and "
    "then the bytes of each tensor that has `binary_data_size`."
)

Size = Annotated[int, Field(ge=0, le=2**31 - 1)]


class OpenInferenceError(BaseModel):
    """What is wrong and what to change."""

    error: str = Field(description="What is wrong and what to change, for people.")
    code: str = Field(description="Stable, for programs.")
    request_id: str = Field(description="Also in the header x-request-id, and in the server's log.")


def write_error(error: ServeAppError, kind: ErrorKind, request_id: str) -> Mapping[str, Any]:
    return {"error": error.message, "code": error.code, "request_id": request_id}


DIALECT = Dialect("Open Inference Protocol", write_error, OpenInferenceError)


class TensorParameters(Body):
    """Of Triton's binary tensors."""

    binary_data_size: int | None = Field(None, ge=0, description="So many bytes after the JSON are the tensor's data.")
    binary_data: bool | None = Field(None, description="Whether the output is wanted as bytes after the JSON.")
    classification: int | None = Field(None, description="Not supported but for 0.", ge=0)
    shared_memory_region: str | None = Field(None, description="Not supported.")


class TensorBody(Body):
    """An input. `data` are its elements in row-major order, in lists of lists or in one."""

    name: str
    shape: Annotated[list[Size], Field(max_length=MOST_DIMENSIONS, fail_fast=True)]
    datatype: str = Field(description="BYTES for texts; INT32 or INT64 for token ids.")
    parameters: TensorParameters | None = None
    data: Annotated[list[Any], Field(max_length=MOST_ELEMENTS)] | None = None


class OutputRequest(Body):
    """An output that is wanted."""

    name: str
    parameters: TensorParameters | None = None


class InferParameters(Body):
    """What is known for every task; docs/tasks.md has those of each."""

    task: str | None = Field(None, description="Another task that the model answers, than that it is served for.")
    binary_data_output: bool | None = Field(None, description="Whether outputs are wanted as bytes after the JSON.")


class InferBody(Body):
    """Tensors for a model."""

    model_config = documented(
        inputs=[{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["What is Deep Learning?", "A cheese."]}],
    )

    id: str | None = Field(None, description="Comes back with the answer.")
    model_name: str | None = Field(None, description="As in the path, which KServe's clients repeat here.")
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[TensorBody], Field(min_length=1, max_length=MOST_TENSORS, fail_fast=True)]
    outputs: Annotated[list[OutputRequest], Field(max_length=MOST_TENSORS, fail_fast=True)] | None = Field(
        None, description="The outputs wanted, each once; all where it is left out."
    )

    @property
    def wants_binary(self) -> bool:
        return (self.parameters or {}).get("binary_data_output") is True

    def call(self, binary: bytes) -> Call:
        """`binary` is what follows the JSON. Raises RequestError."""
        for described in (*self.inputs, *(self.outputs or ())):
            refuse_extensions({} if described.parameters is None else described.parameters.model_dump())
        headers = headers_of([(each.name, each.datatype, each.shape) for each in self.inputs])
        tensors = _tensors(self.inputs, headers, binary)
        parameters = {name: value for name, value in (self.parameters or {}).items() if value is not None}
        return Call(parameters, tensors, tuple(output.name for output in self.outputs or ()))


class OutputBody(BaseModel):
    """An output, its elements in row-major order; those of binary tensors follow the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float] | list[str] | None = None
    parameters: dict[str, int] | None = None


class InferAnswer(BaseModel):
    """What the model gives."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputBody]


class ServerMetadata(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor; -1 in its shape is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives for its own task."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(BaseModel):
    """The server lives."""

    live: bool


class Ready(BaseModel):
    """It answers."""

    name: str | None = None
    ready: bool


def _tensors(bodies: Sequence[TensorBody], headers: Sequence[TensorHeader], binary: bytes) -> tuple[InputTensor, ...]:
    found, at = [], 0
    for body, header in zip(bodies, headers, strict=True):
        size = body.parameters.binary_data_size if body.parameters is not None else None
        if (size is None) == (body.data is None):
            raise MalformedRequestError(f"{header.where}: send either `data` or binary data")
        if size is not None:
            found.append(from_raw(header, binary[at : at + size]))
            at += size
        else:
            found.append(from_list(header, body.data or []))
    if at != len(binary):
        raise MalformedRequestError(f"{len(binary)} bytes follow the JSON, and the `binary_data_size` add to {at}")
    return tuple(found)


def split(exchange: Exchange, raw: bytes) -> tuple[bytes, bytes]:
    """The body's JSON, and what follows it. Raises MalformedRequestError."""
    told = exchange.headers.get(HEADER_LENGTH)
    if told is None:
        return raw, b""
    if not told.isdigit() or len(told) > 18 or int(told) > len(raw):
        raise MalformedRequestError("Inference-Header-Content-Length is not a length within the body")
    return raw[: int(told)], raw[int(told) :]


async def infer(exchange: Exchange) -> Reply:
    raw, binary = split(exchange, await read_body(exchange, media=OCTETS))
    check_nesting(raw, exchange.settings)
    model = choose_model(exchange, None)
    body = parse_body(InferBody, raw, exchange.settings)
    if body.model_name is not None:
        choose_model(exchange, body.model_name)
    call = body.call(binary)
    card = await _asked(exchange, exchange.service.card(model))
    request = call.request(exchange.id, card)
    answer, headers = await compute(exchange, request)
    return _reply(body, model, call.wanted(request, answer), headers)


def _reply(body: InferBody, model: str, tensors: Sequence[OutputTensor], headers: tuple[Header, ...]) -> Reply:
    told = {output.name: output.parameters.binary_data for output in body.outputs or () if output.parameters}
    written, binary = [], []
    for tensor in tensors:
        described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        chosen = told.get(tensor.name)
        if body.wants_binary if chosen is None else chosen:
            binary.append(tensor.raw())
            described["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            described["data"] = tensor.plain()
        written.append(described)
    told_id = {} if body.id is None else {"id": body.id}
    header = encode({"model_name": model, "model_version": VERSION, **told_id, "outputs": written})
    if not binary:
        return Reply(header, content_type=JSON, headers=headers)
    length = (HEADER_LENGTH, b"%d" % len(header))
    return Reply(b"".join((header, *binary)), content_type=OCTETS, headers=(length, *headers))


async def server(exchange: Exchange) -> Reply:
    return Reply(encode({"name": "serve-app", "version": __version__, "extensions": list(EXTENSIONS)}))


async def live(exchange: Exchange) -> Reply:
    return Reply(encode({"live": True}))


async def ready(exchange: Exchange) -> Reply:
    """Of one model or of all. Raises UnavailableError or ModelNotFoundError."""
    name = None if exchange.path_model is None else choose_model(exchange, None)
    await _asked(exchange, exchange.service.ready(name))
    return Reply(encode({"ready": True} if name is None else {"name": name, "ready": True}))


async def model_metadata(exchange: Exchange) -> Reply:
    card = await _asked(exchange, exchange.service.card(choose_model(exchange, None)))
    return Reply(encode(metadata(card)))


async def _asked(exchange: Exchange, question: Coroutine[Any, Any, T]) -> T:
    return await while_connected(exchange.receive, question, exchange.time_left_s)


def routes() -> tuple[Route, ...]:
    asks = (503, 504)
    return (
        Route("GET", "/v2", server, DIALECT, "The server", answer=ServerMetadata),
        Route("GET", "/v2/health/live", live, DIALECT, "Whether the server lives", answer=Live, role=None),
        Route(
            "GET",
            "/v2/health/ready",
            ready,
            DIALECT,
            "Whether every model answers",
            answer=Ready,
            failures=asks,
            role=None,
        ),
        *(
            route
            for version in ("", f"/versions/{VERSION}")
            for route in _model_routes(f"/v2/models/{{name}}{version}")
        ),
    )


def _model_routes(path: str) -> tuple[Route, ...]:
    asks = (404, 503, 504)
    return (
        Route("GET", path, model_metadata, DIALECT, "A model's tensors", answer=ModelMetadata, failures=asks),
        Route(
            "GET", f"{path}/ready", ready, DIALECT, "Whether the model answers", answer=Ready, failures=asks, role=None
        ),
        Route(
            "POST",
            f"{path}/infer",
            infer,
            DIALECT,
            "Any task of the model, in tensors",
            answer=InferAnswer,
            body=InferBody,
            failures=COMPUTE_FAILURES,
            binary=_BINARY,
            description="Metadata tells the tensors of the model's own task; docs/open-inference.md has every task's.",
        ),
    )

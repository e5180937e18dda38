"""The Open Inference Protocol v2 over gRPC, `inference.GRPCInferenceService`, and gRPC's own health service.

Serve finds the methods of the services on the ingress class by their names, and runs the gRPC server itself, because
`grpc_options.grpc_servicer_functions` names `add_to_server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError

from serve_app import __version__
from serve_app.errors import (
    BodyTooLargeError,
    DeadlineExceededError,
    MalformedRequestError,
    ModelNotFoundError,
    ServeAppError,
)
from serve_app.ingress.door import Door, request_id_of
from serve_app.ingress.draining import Draining
from serve_app.ingress.exchange import Header
from serve_app.ingress.inference import as_asked, attach, measured, reserve
from serve_app.ingress.keys import Role
from serve_app.ingress.limits import check_stream
from serve_app.ingress.places import Places
from serve_app.ingress.protocols.open_inference import health, messages
from serve_app.ingress.protocols.open_inference.call import (
    EXTENSIONS,
    VERSION,
    Call,
    check_version,
    headers_of,
    metadata,
    refuse_extensions,
)
from serve_app.ingress.protocols.open_inference.tasks import generated
from serve_app.ingress.protocols.open_inference.tensors import (
    InputTensor,
    OutputTensor,
    TensorHeader,
    from_bytes,
    from_list,
    from_raw,
)
from serve_app.ingress.reach import check_peer
from serve_app.ingress.service import Service, SettingsRef, served_name
from serve_app.ingress.statuses import kind_of, retry_after_s
from serve_app.ingress.visit import Visit, too_late
from serve_app.tasks.generation import GENERATING
from serve_app.timeouts import within
from serve_app.types import Request

T = TypeVar("T")

_CODES: Mapping[int, grpc.StatusCode] = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By the HTTP status of the same error; other statuses of the client's errors are INVALID_ARGUMENT, else INTERNAL."""

_INFERENCE = frozenset({"ModelInfer", "ModelStreamInfer"})
"""Methods whose requests metrics count."""

_SERVER = frozenset({"", messages.SERVICE, health.SERVICE})
"""Names by which the health service is asked about all of the server; others are names of models."""

WATCH_S = 5.0
"""Seconds between two looks at what somebody watches."""

_CONTENTS = {
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
}


class OpenInference:
    """The service's methods over any Service, behind the door that HTTP has too. They raise ServeAppError."""

    def __init__(self, service: Service, settings: SettingsRef, door: Door, draining: Draining | None = None) -> None:
        self.local_only = False
        """Whether calls from other machines are refused."""
        self._service = service
        self._settings = settings
        self._door = door
        self._draining = draining
        self._streams = Places()

    def check(self, context: Any) -> None:
        """Raises ForbiddenError."""
        if self.local_only:
            check_peer(context.peer())

    @contextlib.contextmanager
    def visit(self, method: str, headers: Mapping[bytes, bytes], service: str = messages.SERVICE) -> Iterator[Visit]:
        """The block is the call, or one request of a stream."""
        settings = self._settings.current
        visit = Visit(
            id=request_id_of(headers),
            headers=headers,
            service=self._service,
            settings=settings,
            timeout_s=settings.request_timeout_s,
            bodies=self._door.bodies,
            route=("gRPC", f"/{service}/{method}"),
            is_counted=method in _INFERENCE,
        )
        with self._door.visited(visit):
            yield visit

    async def server_live(self, visit: Visit, asked: Any) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def server_metadata(self, visit: Visit, asked: Any) -> Any:
        self._door.admit(visit, "inference", "page")
        return messages.ServerMetadataResponse(name="serve-app", version=__version__, extensions=EXTENSIONS)

    async def server_ready(self, visit: Visit, asked: Any) -> Any:
        return messages.ServerReadyResponse(ready=await self._is_ready(visit, None))

    async def model_ready(self, visit: Visit, asked: Any) -> Any:
        known = asked.version in ("", VERSION)
        return messages.ModelReadyResponse(ready=known and await self._is_ready(visit, asked.name))

    async def _is_ready(self, visit: Visit, name: str | None) -> bool:
        self._door.admit(visit, None, "question")
        try:
            served = None if name is None else served_name(name, self._service)
            await _within(self._service.ready(served), visit.time_left_s)
        except ServeAppError:
            return False
        return True

    async def health(self, visit: Visit, asked: Any) -> Any:
        """Raises ModelNotFoundError."""
        self._door.admit(visit, None, "question")
        return health.HealthCheckResponse(status=await self._health(asked.service, visit.time_left_s))

    async def watch(self, asked: Any) -> AsyncGenerator[Any, None]:
        """The health now, and again whenever it has changed. A model that is not served may come."""
        told = None
        while True:
            try:
                status = await self._health(asked.service, self._settings.current.request_timeout_s)
            except ModelNotFoundError:
                status = health.SERVICE_UNKNOWN
            if status != told:
                yield health.HealthCheckResponse(status=status)
            told = status
            await asyncio.sleep(WATCH_S)

    async def _health(self, name: str, timeout_s: float) -> int:
        """Of the server, or of one model. Raises ModelNotFoundError."""
        try:
            model = None if name in _SERVER else served_name(name, self._service)
            await _within(self._service.ready(model), timeout_s)
        except ModelNotFoundError:
            raise
        except ServeAppError:
            return int(health.NOT_SERVING)
        return int(health.SERVING)

    async def model_metadata(self, visit: Visit, asked: Any) -> Any:
        self._door.admit(visit, "inference", "question")
        check_version(asked.version)
        card = await _within(self._service.card(self._model(asked.name)), visit.time_left_s)
        return messages.ModelMetadataResponse(**metadata(card))

    async def infer(self, visit: Visit, asked: Any) -> tuple[Any, tuple[Header, ...]]:
        """The response, and what it cost."""
        self._door.admit(visit, "inference", "inference")
        call, request = await self._read(visit, asked)
        return await _whole(visit, asked, call, request)

    async def stream(self, visit: Visit, asked: Any) -> AsyncGenerator[Any, None]:
        """A response for each piece of a generated text, and one for the answer to any other task."""
        self._door.admit(visit, "inference", "inference")
        call, request = await self._read(visit, asked)
        if request.task not in GENERATING:
            response, _ = await _whole(visit, asked, call, request)
            yield response
            return
        attach(visit, request)
        check_stream(request, visit.settings)
        async with aclosing(self._pieces(visit, request)) as pieces:
            async for tensors in pieces:
                wanted = [each for each in tensors if not call.outputs or each.name in call.outputs]
                yield _response(asked, request, wanted)

    @contextlib.contextmanager
    def opened(
        self,
        context: Any,
        headers: Mapping[bytes, bytes],
        method: str = "ModelStreamInfer",
        role: Role | None = "inference",
        service: str = messages.SERVICE,
    ) -> Iterator[None]:
        """The block is a stream, which has a place as long as it is open.

        Raises ForbiddenError, UnauthorizedError or OverloadedError before anything of the stream is read; it is then
        told and counted as one request.
        """
        try:
            self.check(context)
            self._door.account(headers, role)
            self._streams.take(self._settings.current.max_concurrent_requests, "streams are open")
        except ServeAppError as error:
            with self.visit(method, headers, service) as refused:
                refused.status = kind_of(refused.expected(error)).status
            raise
        opened = time.perf_counter()
        try:
            yield
        finally:
            self._streams.leave(time.perf_counter() - opened)

    async def requests(self, stream: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """A stream's requests; it is ended when none comes for too long.

        Raises DeadlineExceededError, or UnavailableError when the replica stops.
        """
        incoming = _requests_in_time(stream, self._settings.current.stream_idle_timeout_s)
        async with aclosing(self.until_stopping(incoming)) as requests:
            async for request in requests:
                yield request

    def until_stopping(self, parts: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """`parts`; raises UnavailableError when the replica stops."""
        return parts if self._draining is None else self._draining.until_stopping(parts)

    async def _pieces(self, visit: Visit, request: Request) -> AsyncGenerator[Sequence[OutputTensor], None]:
        """`finish_reason` is empty but in the last piece."""
        await _within(reserve(visit, request), visit.time_left_s)
        pieces: Any = self._service.stream(as_asked(visit, request))
        async with aclosing(pieces):
            while (piece := await _within(anext(pieces, None), visit.time_left_s)) is not None:
                visit.truncated += piece.truncated
                yield generated([piece.text], [piece.finish_reason or ""])

    async def _read(self, visit: Visit, asked: Any) -> tuple[Call, Request]:
        most = visit.settings.max_body_bytes
        size = asked.ByteSize()
        if size > most:
            raise BodyTooLargeError(f"the message is larger than the {most} bytes that one request may have; split it")
        visit.hold(size)
        check_version(asked.model_version)
        for described in (*asked.inputs, *asked.outputs):
            refuse_extensions(_parameters(described.parameters))
        visit.model = model = self._model(asked.model_name)
        call = Call(_parameters(asked.parameters), _inputs(asked), tuple(output.name for output in asked.outputs))
        return call, call.request(visit.id, await _within(self._service.card(model), visit.time_left_s))

    def _model(self, name: str) -> str:
        """Raises ModelNotFoundError."""
        models = self._service.models
        if name == "" and len(models) == 1:
            return models[0]
        return served_name(name, self._service)


async def _whole(visit: Visit, asked: Any, call: Call, request: Request) -> tuple[Any, tuple[Header, ...]]:
    answer, cost = await measured(visit, request, _within)
    return _response(asked, request, call.wanted(request, answer)), cost


async def _requests_in_time(stream: AsyncIterator[Any], idle_s: float) -> AsyncGenerator[Any, None]:
    """Raises DeadlineExceededError."""
    incoming = aiter(stream)
    try:
        while (request := await within(anext(incoming, None), idle_s)) is not None:
            yield request
    except asyncio.TimeoutError:
        raise DeadlineExceededError(
            f"no request came on this stream for {idle_s:g} s; open another when there is one"
        ) from None


async def _within(work: Awaitable[T], timeout_s: float) -> T:
    """Raises DeadlineExceededError, and what `work` raises."""
    try:
        return await within(work, timeout_s)
    except asyncio.TimeoutError:
        raise too_late() from None


class OpenInferenceMethods:
    """The methods as Serve, or a gRPC server, calls them. A class that mixes this in has `open_inference`."""

    open_inference: OpenInference

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802, the protocol's names
        return await self._called("ServerLive", self.open_inference.server_live, request, grpc_context)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._called("ServerReady", self.open_inference.server_ready, request, grpc_context)

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._called("ModelReady", self.open_inference.model_ready, request, grpc_context)

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._called("ServerMetadata", self.open_inference.server_metadata, request, grpc_context)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._called("ModelMetadata", self.open_inference.model_metadata, request, grpc_context)

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._called("ModelInfer", self.open_inference.infer, request, grpc_context)

    async def ModelStreamInfer(  # noqa: N802
        self, request_stream: AsyncIterator[Any], grpc_context: Any
    ) -> AsyncGenerator[Any, None]:
        """Each request's responses before the next one's; an error is a response, and the stream goes on."""
        headers = _headers(grpc_context)
        try:
            with self.open_inference.opened(grpc_context, headers):
                async with aclosing(self.open_inference.requests(request_stream)) as requests:
                    async for request in requests:
                        async with aclosing(self._streamed(request, headers, grpc_context)) as responses:
                            async for response in responses:
                                yield response
        except ServeAppError as error:
            _end(grpc_context, error, headers)

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._called("Check", self.open_inference.health, request, grpc_context, health.SERVICE)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        """Holds a stream's place as long as it is open, and asks for no key, as `Check` does."""
        headers = _headers(grpc_context)
        try:
            with self.open_inference.opened(grpc_context, headers, "Watch", None, health.SERVICE):
                watched = self.open_inference.watch(_readable(request))
                async with aclosing(self.open_inference.until_stopping(watched)) as responses:
                    async for response in responses:
                        yield response
        except ServeAppError as error:
            _end(grpc_context, error, headers)

    async def _streamed(self, request: Any, headers: Mapping[bytes, bytes], context: Any) -> AsyncGenerator[Any, None]:
        """The responses to one request of a stream."""
        with self.open_inference.visit("ModelStreamInfer", headers) as visit:
            context.set_trailing_metadata(_metadata(visit))
            try:
                async with aclosing(self.open_inference.stream(visit, _readable(request))) as responses:
                    async for response in responses:
                        yield messages.ModelStreamInferResponse(infer_response=response)
                visit.status = 200
            except Exception as raised:
                error = visit.expected(raised)
                visit.status = kind_of(error).status
                told = {} if isinstance(request, Unreadable) else {"id": request.id, "model_name": request.model_name}
                failed = messages.ModelInferResponse(**told)
                yield messages.ModelStreamInferResponse(error_message=error.message, infer_response=failed)

    async def _called(
        self, method: str, work: Method, request: Any, context: Any, service: str = messages.SERVICE
    ) -> Any:
        """The method's response, or an empty one beside the error's status: Serve would log each that is raised."""
        with self.open_inference.visit(method, _headers(context), service) as visit:
            try:
                self.open_inference.check(context)
                answered = await work(visit, _readable(request))
            except Exception as raised:
                error = visit.expected(raised)
                visit.status = kind_of(error).status
                context.set_code(code_of(error))
                context.set_details(error.message)
                context.set_trailing_metadata([*_metadata(visit), *_come_back(error)])
                return _ANSWERS[method]()
            visit.status = 200
            response, cost = answered if isinstance(answered, tuple) else (answered, ())
            context.set_trailing_metadata(_metadata(visit, cost))
            return response


Method: TypeAlias = Callable[[Visit, Any], Awaitable[Any]]

_ANSWERS = {
    "ServerLive": messages.ServerLiveResponse,
    "ServerReady": messages.ServerReadyResponse,
    "ModelReady": messages.ModelReadyResponse,
    "ServerMetadata": messages.ServerMetadataResponse,
    "ModelMetadata": messages.ModelMetadataResponse,
    "ModelInfer": messages.ModelInferResponse,
    "Check": health.HealthCheckResponse,
}


def _end(context: Any, error: ServeAppError, headers: Mapping[bytes, bytes]) -> None:
    """Tell the client why its stream ends."""
    context.set_code(code_of(error))
    context.set_details(error.message)
    context.set_trailing_metadata([("x-request-id", request_id_of(headers)), *_come_back(error)])


def _headers(context: Any) -> Mapping[bytes, bytes]:
    """A call's metadata, as HTTP headers are."""
    return {key.encode(): value.encode() for key, value in context.invocation_metadata() if isinstance(value, str)}


def _metadata(visit: Visit, headers: Sequence[Header] = ()) -> list[tuple[str, str]]:
    """Trailing metadata: what HTTP says in headers."""
    return [("x-request-id", visit.id), *((name.decode(), value.decode()) for name, value in headers)]


def _come_back(error: ServeAppError) -> list[tuple[str, str]]:
    """`retry-after` as over HTTP, and in the name and unit that gRPC's own retries obey.

    https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
    """
    wait_s = retry_after_s(error)
    return [] if wait_s is None else [("retry-after", f"{wait_s}"), ("grpc-retry-pushback-ms", f"{wait_s * 1000}")]


def code_of(error: ServeAppError) -> grpc.StatusCode:
    status = kind_of(error).status
    usual = grpc.StatusCode.INVALID_ARGUMENT if status < 500 and status != 424 else grpc.StatusCode.INTERNAL
    return _CODES.get(status, usual)


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: (value, value.WhichOneof("parameter_choice")) for name, value in parameters.items()}
    return {name: getattr(value, kind) for name, (value, kind) in found.items() if kind is not None}


def _inputs(asked: Any) -> tuple[InputTensor, ...]:
    """Raises MalformedRequestError or InvalidInputError."""
    headers = headers_of([(each.name, each.datatype, each.shape) for each in asked.inputs])
    raw = asked.raw_input_contents
    if not raw:
        return tuple(_typed(header, each.contents) for header, each in zip(headers, asked.inputs, strict=True))
    if len(raw) != len(headers):
        raise MalformedRequestError(f"`raw_input_contents` has {len(raw)} parts for {len(headers)} inputs")
    return tuple(from_raw(header, part) for header, part in zip(headers, raw, strict=True))


def _typed(header: TensorHeader, contents: Any) -> InputTensor:
    if header.datatype == "BYTES":
        return from_bytes(header, contents.bytes_contents)
    return from_list(header, list(getattr(contents, _CONTENTS.get(header.datatype, ""), ())))


def _response(asked: Any, request: Request, tensors: Sequence[OutputTensor]) -> Any:
    response = messages.ModelInferResponse(model_name=request.model, model_version=VERSION, id=asked.id)
    for tensor in tensors:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(tensor.raw())
    return response


_UNARY = {
    "ServerLive": messages.ServerLiveRequest,
    "ServerReady": messages.ServerReadyRequest,
    "ModelReady": messages.ModelReadyRequest,
    "ServerMetadata": messages.ServerMetadataRequest,
    "ModelMetadata": messages.ModelMetadataRequest,
    "ModelInfer": messages.ModelInferRequest,
}
"""Methods of one request and one response, and what each is asked with."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of a message that is none, so that it gets the answer of a request that is refused.

    An error in reading it would be gRPC's own, of the status UNKNOWN, with the parser's words.
    """


def _readable(request: Any) -> Any:
    """Raises MalformedRequestError."""
    if isinstance(request, Unreadable):
        raise MalformedRequestError(
            "the bytes are no message of this method; send what open_inference.proto or health.proto says"
        )
    return request


def _reader(message: Any) -> Callable[[bytes], Any]:
    def read(raw: bytes) -> Any:
        try:
            return message.FromString(raw)
        except DecodeError:
            return Unreadable()

    return read


def add_to_server(servicer: Any, server: Any) -> None:
    """What `grpc_options.grpc_servicer_functions` names: register the services' methods on a gRPC server."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name), _reader(asked), _serialize)
        for name, asked in _UNARY.items()
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        servicer.ModelStreamInfer, _reader(messages.ModelInferRequest), _serialize
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    read = _reader(health.HealthCheckRequest)
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(servicer.Check, read, _serialize),
        "Watch": grpc.unary_stream_rpc_method_handler(servicer.Watch, read, _serialize),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(health.SERVICE, handlers),))
    _describe()


def _serialize(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString()
    return serialized


def _describe() -> None:
    """Let Serve's reflection tell the service to tools such as grpcurl; it looks into the process-wide pool.

    The health service is not told: then `grpcio-health-checking`, which describes more of it, could not be imported.
    """
    with contextlib.suppress(TypeError):  # tritonclient in the same process has described it already
        descriptor_pool.Default().AddSerializedFile(messages.FILE.SerializeToString())

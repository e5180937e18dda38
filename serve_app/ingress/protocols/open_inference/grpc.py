"""The Open Inference Protocol v2 over gRPC: `inference.GRPCInferenceService` on the ingress.

Serve finds the methods of the service on the ingress class by their names, and runs the gRPC server itself, because
`grpc_options.grpc_servicer_functions` names `add_to_server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, Protocol, TypeVar

import grpc
from google.protobuf import descriptor_pool

from serve_app import __version__
from serve_app.errors import (
    BodyTooLargeError,
    DeadlineExceededError,
    MalformedRequestError,
    ModelNotFoundError,
    ServeAppError,
    ServerError,
)
from serve_app.ingress.limits import check_limits, check_stream
from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.protocols.open_inference.call import (
    EXTENSIONS,
    VERSION,
    Call,
    check_version,
    headers_of,
    metadata,
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
from serve_app.ingress.service import Service, SettingsRef
from serve_app.ingress.statuses import kind_of
from serve_app.outputs import Generated
from serve_app.tasks.generation import GENERATING
from serve_app.types import Answer, Request

logger = logging.getLogger(__name__)
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


Headers = Mapping[bytes, bytes]
"""A call's metadata, as HTTP headers are."""


class Account(Protocol):
    """Who asks, and what is left to it."""

    def enter(self) -> None:
        """Count one request. Raises OverloadedError."""

    def charge(self, tokens: int) -> None:
        """Count what a request has cost."""


class Guard(Protocol):
    """Lets those in who may ask."""

    def admit(self, headers: Headers, role: Literal["inference"]) -> Account:
        """Raises RequestError."""


class OpenInference:
    """The service's methods over any Service, open to all unless there is a guard. They raise ServeAppError."""

    def __init__(self, service: Service, settings: SettingsRef, guard: Guard | None = None) -> None:
        self._service = service
        self._settings = settings
        self._guard = guard

    async def server_metadata(self, headers: Headers) -> Any:
        self._admit(headers)
        return messages.ServerMetadataResponse(name="serve-app", version=__version__, extensions=EXTENSIONS)

    async def server_ready(self) -> Any:
        return messages.ServerReadyResponse(ready=await self._is_ready(None))

    async def model_ready(self, asked: Any) -> Any:
        known = asked.version in ("", VERSION)
        return messages.ModelReadyResponse(ready=known and await self._is_ready(asked.name))

    async def _is_ready(self, name: str | None) -> bool:
        try:
            await self._in_time(self._service.ready(name))
        except ServeAppError:
            return False
        return True

    async def model_metadata(self, asked: Any, headers: Headers) -> Any:
        self._admit(headers)
        check_version(asked.version)
        card = await self._in_time(self._service.card(self._model(asked.name)))
        return messages.ModelMetadataResponse(**metadata(card))

    async def infer(self, asked: Any, headers: Headers) -> Any:
        account = self._admit(headers, enters=True)
        call, request = await self._read(asked)
        return await self._whole(asked, call, request, account)

    async def stream(self, asked: Any, headers: Headers) -> AsyncGenerator[Any, None]:
        """A response for each piece of a generated text, and one for the answer to any other task."""
        account = self._admit(headers, enters=True)
        call, request = await self._read(asked)
        if request.task not in GENERATING:
            yield await self._whole(asked, call, request, account)
            return
        check_stream(request, self._settings.current)
        async with aclosing(self._pieces(request, account)) as pieces:
            async for tensors in pieces:
                wanted = [each for each in tensors if not call.outputs or each.name in call.outputs]
                yield _response(asked, request, wanted)

    async def _whole(self, asked: Any, call: Call, request: Request, account: Account | None) -> Any:
        check_limits(request, self._settings.current)
        answer = await self._in_time(self._service.answer(request))
        if account is not None:
            account.charge(_cost(answer))
        return _response(asked, request, call.wanted(request, answer))

    async def _pieces(self, request: Request, account: Account | None) -> AsyncGenerator[Sequence[OutputTensor], None]:
        """`finish_reason` is empty but in the last piece."""
        pieces: Any = self._service.stream(request)
        end = asyncio.get_running_loop().time() + self._settings.current.request_timeout_s
        prompt_tokens = new_tokens = 0
        try:
            async with aclosing(pieces):
                while (piece := await self._in_time(anext(pieces, None), end)) is not None:
                    prompt_tokens = max(prompt_tokens, piece.prompt_tokens)
                    new_tokens += piece.token is not None
                    yield generated([piece.text], [piece.finish_reason or ""])
        finally:
            if account is not None:
                account.charge(prompt_tokens + new_tokens)

    def _admit(self, headers: Headers, enters: bool = False) -> Account | None:
        """Raises RequestError, or OverloadedError where a quota is used up."""
        if self._guard is None:
            return None
        account = self._guard.admit(headers, "inference")
        if enters:
            account.enter()
        return account

    async def _read(self, asked: Any) -> tuple[Call, Request]:
        most = self._settings.current.max_body_bytes
        if asked.ByteSize() > most:
            raise BodyTooLargeError(f"the message is larger than the {most} bytes that one request may have; split it")
        check_version(asked.model_version)
        model = self._model(asked.model_name)
        call = Call(_parameters(asked.parameters), _inputs(asked), tuple(output.name for output in asked.outputs))
        return call, call.request(uuid.uuid4().hex, await self._in_time(self._service.card(model)))

    def _model(self, name: str) -> str:
        """Raises ModelNotFoundError."""
        models = self._service.models
        if name == "" and len(models) == 1:
            return models[0]
        if name not in models:
            raise ModelNotFoundError(f"no model of that name is served; there is: {', '.join(models)}")
        return name

    async def _in_time(self, work: Awaitable[T], end: float | None = None) -> T:
        """`end` is a time of the event loop. Raises DeadlineExceededError, and what `work` raises."""
        whole_s = self._settings.current.request_timeout_s
        left_s = whole_s if end is None else max(0.0, end - asyncio.get_running_loop().time())
        try:
            return await asyncio.wait_for(work, left_s)
        except asyncio.TimeoutError:
            raise DeadlineExceededError(f"no answer within {whole_s:g} s; send less or try again later") from None


class OpenInferenceMethods:
    """The methods as Serve, or a gRPC server, calls them. A class that mixes this in has `open_inference`."""

    open_inference: OpenInference

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802, the protocol's names
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self.open_inference.server_ready()

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self.open_inference.model_ready(request)

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        work = self.open_inference.server_metadata(_headers(grpc_context))
        return await _told(work, grpc_context, messages.ServerMetadataResponse)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        work = self.open_inference.model_metadata(request, _headers(grpc_context))
        return await _told(work, grpc_context, messages.ModelMetadataResponse)

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        work = self.open_inference.infer(request, _headers(grpc_context))
        return await _told(work, grpc_context, messages.ModelInferResponse)

    async def ModelStreamInfer(  # noqa: N802
        self, request_stream: AsyncIterator[Any], grpc_context: Any
    ) -> AsyncGenerator[Any, None]:
        """Each request's responses before the next one's; an error is a response, and the stream goes on."""
        async for request in request_stream:
            try:
                async with aclosing(self.open_inference.stream(request, _headers(grpc_context))) as responses:
                    async for response in responses:
                        yield messages.ModelStreamInferResponse(infer_response=response)
            except Exception as error:
                failed = messages.ModelInferResponse(id=request.id, model_name=request.model_name)
                told = _expected(error).message
                yield messages.ModelStreamInferResponse(error_message=told, infer_response=failed)


async def _told(work: Awaitable[Any], context: Any, empty: Callable[[], Any]) -> Any:
    """The work's response, or an empty one beside the error's status: Serve would log each that is raised."""
    try:
        return await work
    except Exception as raised:
        error = _expected(raised)
        context.set_code(code_of(error))
        context.set_details(error.message)
        return empty()


def _expected(error: Exception) -> ServeAppError:
    if isinstance(error, ServeAppError):
        return error
    logger.error("unexpected error in a gRPC call", exc_info=error)
    return ServerError("an unexpected error; the server's log has it")


def _headers(context: Any) -> Headers:
    return {key.encode(): value.encode() for key, value in context.invocation_metadata() if isinstance(value, str)}


def _cost(answer: Answer) -> int:
    """Tokens that were computed, the generated ones too."""
    new = (len(each.tokens) for each in answer.output if isinstance(each, Generated))
    return answer.tokens + (sum(new) if isinstance(answer.output, tuple) else 0)


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


def add_to_server(servicer: Any, server: Any) -> None:
    """What `grpc_options.grpc_servicer_functions` names: register the service's methods on a gRPC server."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name), asked.FromString, _serialize)
        for name, asked in _UNARY.items()
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        servicer.ModelStreamInfer, messages.ModelInferRequest.FromString, _serialize
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    _describe()


def _serialize(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString()
    return serialized


def _describe() -> None:
    """Let Serve's reflection tell the service to tools such as grpcurl; it looks into the process-wide pool."""
    with contextlib.suppress(TypeError):  # tritonclient in the same process has described it already
        descriptor_pool.Default().AddSerializedFile(messages.FILE.SerializeToString())

"""Tensors of the Open Inference Protocol, on the wire and off it.

Raw bytes are little-endian and row-major; of BYTES each element is its length, as 4 bytes, and then itself. Source:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.errors import EmptyInputError, InvalidInputError, MalformedRequestError
from serve_app.types import TokenIds

MOST_DIMENSIONS = 8
MOST_ELEMENTS = 10_000_000
"""Of one tensor's JSON, whatever the operator allows."""

_LENGTH_BYTES = 4
_MAX_TOKEN_ID = 2**31 - 1
INTEGERS = {
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
}
"""Datatypes that token ids may have, as numpy's."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """What metadata says of a tensor; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What stands beside an input's data; `index` is its place among the inputs, by which errors name it."""

    index: int
    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        return f"`inputs[{self.index}]`"


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor as it was sent: texts where it is BYTES, else whole numbers, in row-major order."""

    name: str
    shape: tuple[int, ...]
    values: Sequence[str] | Sequence[int]


OutputValues: TypeAlias = npt.NDArray[Any] | Sequence[str]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to send: texts in row-major order with their shape, or an array."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: OutputValues

    def raw(self) -> bytes:
        if isinstance(self.values, np.ndarray):
            return self.values.tobytes()
        return b"".join(_with_length(value.encode()) for value in self.values)

    def plain(self) -> OutputValues:
        """The elements in one row, as JSON takes them."""
        return self.values.ravel() if isinstance(self.values, np.ndarray) else self.values


def _with_length(value: bytes) -> bytes:
    return len(value).to_bytes(_LENGTH_BYTES, "little") + value


def array(name: str, values: npt.NDArray[Any]) -> OutputTensor:
    """Of float32 or int32."""
    datatype = "FP32" if values.dtype == np.float32 else "INT32"
    return OutputTensor(name, datatype, values.shape, np.ascontiguousarray(values))


def texts(name: str, values: Sequence[str], shape: tuple[int, ...] | None = None) -> OutputTensor:
    return OutputTensor(name, "BYTES", (len(values),) if shape is None else shape, values)


def from_raw(header: TensorHeader, raw: bytes) -> InputTensor:
    """Raises MalformedRequestError or InvalidInputError."""
    if header.datatype == "BYTES":
        return from_bytes(header, _elements(header, raw))
    dtype = np.dtype(_integers(header))
    if len(raw) % dtype.itemsize:
        raise MalformedRequestError(f"{header.where}: {len(raw)} bytes are no whole number of its datatype's elements")
    return _checked(header, np.frombuffer(raw, dtype).tolist())


def from_bytes(header: TensorHeader, elements: Iterable[bytes]) -> InputTensor:
    """Raises MalformedRequestError."""
    try:
        return _checked(header, [element.decode() for element in elements])
    except UnicodeDecodeError:
        raise MalformedRequestError(f"{header.where}: a text is not valid UTF-8") from None


def from_list(header: TensorHeader, data: Sequence[Any]) -> InputTensor:
    """Of elements that may stand in lists of lists. Raises MalformedRequestError or InvalidInputError."""
    values: list[Any] = []
    _flatten(data, values, header, levels=MOST_DIMENSIONS)
    if header.datatype == "BYTES":
        if not all(type(value) is str for value in values):
            raise MalformedRequestError(f"{header.where}: its datatype is BYTES, and its data are not all texts")
    elif _integers(header) and not all(type(value) is int for value in values):
        raise MalformedRequestError(f"{header.where}: its data are not all whole numbers")
    return _checked(header, values)


def token_ids(tensor: InputTensor) -> tuple[TokenIds, ...]:
    """The rows of a tensor of whole numbers [n, k], or [k] for one row. Raises RequestError."""
    values: Any = tensor.values
    if len(tensor.shape) not in (1, 2):
        raise InvalidInputError(f"input {tensor.name}: token ids have the shape [n, k]")
    width = tensor.shape[-1]
    if not values:
        raise EmptyInputError(f"input {tensor.name} is empty; send at least one token id")
    if any(type(value) is not int for value in values):
        raise MalformedRequestError(f"input {tensor.name}: token ids are INT32 or INT64")
    if min(values) < 0 or max(values) > _MAX_TOKEN_ID:
        raise MalformedRequestError(f"input {tensor.name} has a token id outside 0 to {_MAX_TOKEN_ID}")
    return tuple(tuple(values[start : start + width]) for start in range(0, len(values), width))


def without_padding(rows: Sequence[TokenIds], mask: InputTensor, shape: tuple[int, ...]) -> tuple[TokenIds, ...]:
    """Each of `rows`, of a tensor of that shape, without the ids at its ends where `mask` is 0. Raises RequestError."""
    if mask.shape != shape:
        raise InvalidInputError(f"input {mask.name} has another shape than input_ids; make them the same")
    if any(value not in (0, 1) or type(value) is not int for value in mask.values):
        raise InvalidInputError(f"input {mask.name} takes 0 and 1 only, as INT32 or INT64")
    masks: Any = mask.values
    width = shape[-1]
    return tuple(
        _kept(row, masks[index * width : (index + 1) * width], f"input {mask.name}: row {index}")
        for index, row in enumerate(rows)
    )


def _kept(row: TokenIds, mask: Sequence[int], where: str) -> TokenIds:
    count = sum(mask)
    if not count:
        raise EmptyInputError(f"{where} masks every token; leave the row out")
    first = list(mask).index(1)
    if sum(mask[first : first + count]) != count:
        raise InvalidInputError(f"{where} has a 0 between two 1; only padding at the ends can be left out")
    return row[first : first + count]


def _integers(header: TensorHeader) -> str:
    dtype = INTEGERS.get(header.datatype)
    if dtype is None:
        raise InvalidInputError(
            f"{header.where}: texts are BYTES, token ids INT32 or INT64; no other datatype is taken"
        )
    return dtype


def _elements(header: TensorHeader, raw: bytes) -> Iterable[bytes]:
    at = 0
    while at < len(raw):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            raise MalformedRequestError(f"{header.where}: its binary data end within an element")
        yield raw[start:at]


def _flatten(data: Sequence[Any], found: list[Any], header: TensorHeader, levels: int) -> None:
    """Put the elements of lists in lists, at most `levels` of them, into `found`; each is looked at once.

    Raises MalformedRequestError.
    """
    if not levels:
        raise MalformedRequestError(f"{header.where}: its data are lists in more than {MOST_DIMENSIONS} lists")
    if list not in set(map(type, data)):
        found.extend(data)
        return
    for value in data:
        if type(value) is list:
            _flatten(value, found, header, levels - 1)
        else:
            found.append(value)


def _checked(header: TensorHeader, values: Sequence[str] | Sequence[int]) -> InputTensor:
    if any(size < 0 for size in header.shape) or math.prod(header.shape) != len(values):
        raise MalformedRequestError(f"{header.where} has {len(values)} elements, and its shape says another number")
    return InputTensor(header.name, header.shape, values)

"""A call of the protocol, by HTTP or gRPC, as a Request and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.errors import InvalidInputError, MalformedRequestError, ModelNotFoundError
from serve_app.ingress.body import validated
from serve_app.ingress.protocols.open_inference.tasks import TASK_TENSORS, Inputs, TaskTensors
from serve_app.ingress.protocols.open_inference.tensors import MOST_DIMENSIONS, InputTensor, OutputTensor, TensorHeader
from serve_app.ingress.protocols.task_options import OPTIONS
from serve_app.types import Answer, ModelCard, Request

VERSION = "1"
"""The only version of every model. Which files are served is `revision` in `/info`."""

EXTENSIONS = ("binary_tensor_data", "parameters")
_SHARED_MEMORY = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
_CLASSES = ("classification", "class_count")
MOST_TENSORS = 16

_OF_THE_PROTOCOL = frozenset(
    (
        "task",
        "binary_data_output",
        "triton_enable_empty_final_response",
        *("sequence_id", "sequence_start", "sequence_end", "priority", "timeout"),
    )
)
"""Parameters that are no options of a task: what form the answer is wanted in, and Triton's hints for its queue, which
clients send and which change no answer.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """What the client asks of a model."""

    parameters: Mapping[str, Any]
    inputs: tuple[InputTensor, ...]
    outputs: tuple[str, ...]
    """Those wanted; all where it is empty."""

    def request(self, id: str, card: ModelCard) -> Request:
        """Of the task that the parameter `task` names, else of the model's own. Raises RequestError."""
        task = self.parameters.get("task", card.task)
        tensors = TASK_TENSORS.get(task) if isinstance(task, str) else None
        if tensors is None:
            raise InvalidInputError(f"`parameters.task` names no task; there are: {', '.join(TASK_TENSORS)}")
        self._check_outputs(tensors)
        inputs = Inputs(self.inputs)
        tensors.check_inputs(inputs)
        told = {name: value for name, value in self.parameters.items() if name not in _OF_THE_PROTOCOL}
        chosen = validated(OPTIONS[task], told, "parameters")
        texts, options = tensors.read(inputs, chosen)
        return chosen.request(id, card.name, task, texts, options)

    def _check_outputs(self, tensors: TaskTensors[Any]) -> None:
        """Each at most once: an answer may not be larger than the model's just because a name stands often."""
        names = [output.name for output in tensors.outputs]
        if not set(self.outputs) <= set(names):
            raise InvalidInputError(f"`outputs` has one that this task does not give; it gives: {', '.join(names)}")
        if len(set(self.outputs)) != len(self.outputs):
            raise MalformedRequestError("`outputs` has one twice; name each output once")

    def wanted(self, request: Request, answer: Answer) -> tuple[OutputTensor, ...]:
        """The answer's tensors, in the order in which they were asked for."""
        made = {tensor.name: tensor for tensor in TASK_TENSORS[request.task].write(answer)}
        return tuple(made[name] for name in self.outputs or made)


def refuse_extensions(parameters: Mapping[str, Any]) -> None:
    """Of an input or a wanted output. Raises InvalidInputError for what Triton does with them and we do not."""
    if any(parameters.get(name) is not None for name in _SHARED_MEMORY) or any(map(parameters.get, _CLASSES)):
        raise InvalidInputError("shared memory and the classification extension are not supported here; leave them out")


def check_version(version: str) -> None:
    """Raises ModelNotFoundError."""
    if version not in ("", VERSION):
        raise ModelNotFoundError(f"every model has one version here, {VERSION}; leave the version out")


def headers_of(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> tuple[TensorHeader, ...]:
    """Of names, datatypes and shapes. Raises MalformedRequestError."""
    if len(tensors) > MOST_TENSORS:
        raise MalformedRequestError(f"`inputs` has {len(tensors)} tensors; no task takes more than {MOST_TENSORS}")
    if any(len(shape) > MOST_DIMENSIONS for _, _, shape in tensors):
        raise MalformedRequestError(f"`inputs` has a tensor of more than {MOST_DIMENSIONS} dimensions")
    return tuple(TensorHeader(i, name, kind, tuple(shape)) for i, (name, kind, shape) in enumerate(tensors))


def metadata(card: ModelCard) -> dict[str, Any]:
    """What a model takes and gives for its own task."""
    tensors = TASK_TENSORS[card.task]
    inputs, outputs = (
        [{"name": each.name, "datatype": each.datatype, "shape": list(each.shape)} for each in types]
        for types in (tensors.inputs, tensors.outputs)
    )
    platform = f"transformers_{card.model_type}"
    return {"name": card.name, "versions": [VERSION], "platform": platform, "inputs": inputs, "outputs": outputs}

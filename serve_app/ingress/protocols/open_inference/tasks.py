"""What each task's tensors are: how its inputs become a Request, and an Answer its outputs.

Texts are BYTES in UTF-8, of any shape; `n` is how many there are. Outputs that are not numbers or texts are BYTES too,
each with the JSON of one input's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np

from serve_app.errors import EmptyInputError, InvalidInputError, MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import LongTextFields
from serve_app.ingress.protocols.generation import GenerationFields
from serve_app.ingress.protocols.open_inference.tensors import (
    InputTensor,
    OutputTensor,
    TensorType,
    array,
    texts,
    token_ids,
    without_padding,
)
from serve_app.ingress.protocols.task_options import (
    ClassificationFields,
    EmbeddingFields,
    EntityFields,
    FillMaskFields,
    PromptFields,
    QuestionFields,
    RerankFields,
    ZeroShotFields,
)
from serve_app.options import SimilarityOptions, SparseEmbeddingOptions, TaskOptions, TokenEmbeddingOptions
from serve_app.outputs import FloatArray, Generated, LabelScore, Ranking, SparseVector
from serve_app.types import Answer, TextInput

ParametersT = TypeVar("ParametersT", bound=LongTextFields)


class Inputs:
    """A request's input tensors by name."""

    def __init__(self, tensors: Sequence[InputTensor]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        if len(self._tensors) != len(tensors):
            raise MalformedRequestError("two inputs have the same name")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def texts(self, name: str) -> tuple[str, ...]:
        """Raises RequestError if the tensor is missing, not of texts, or has none. Texts may be empty."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise MalformedRequestError(f"input {name} is missing")
        found = tuple(value for value in tensor.values if isinstance(value, str))
        if len(found) != len(tensor.values):
            raise InvalidInputError(f"input {name} takes texts, whose datatype is BYTES")
        if not found:
            raise EmptyInputError(f"input {name} has no text; send at least one")
        return found

    def words(self, name: str) -> tuple[str, ...]:
        """As `texts`, of what must say something (labels, targets, questions)."""
        found = self.texts(name)
        if "" in found:
            raise EmptyInputError(f"input {name}[{found.index('')}] is an empty text; leave it out")
        return found

    def one_text(self, name: str) -> str:
        found = self.texts(name)
        if len(found) != 1:
            raise InvalidInputError(f"input {name} takes one text, and there are {len(found)}")
        return found[0]

    def texts_or_ids(self) -> tuple[TextInput, ...]:
        """`text`, or in its place `input_ids`, those that an `attention_mask` leaves."""
        if "input_ids" not in self:
            return self.texts("text")
        if "text" in self:
            raise InvalidInputError("send either text or input_ids")
        tensor, mask = self._tensors["input_ids"], self._tensors.get("attention_mask")
        rows = token_ids(tensor)
        return rows if mask is None else without_padding(rows, mask, tensor.shape)

    def pairs(self, first: str, second: str) -> tuple[TextInput, ...]:
        left, right = self.texts(first), self.texts(second)
        if len(left) != len(right):
            raise InvalidInputError(
                f"inputs {first} and {second} have {len(left)} and {len(right)} texts; send as many"
            )
        return tuple(zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class TaskTensors(Generic[ParametersT]):
    """One task: the tensors that it takes and gives. Its parameters are those of `task_options.OPTIONS`."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    read: Callable[[Inputs, ParametersT], tuple[tuple[TextInput, ...], TaskOptions]]
    """The request's inputs and options. Raises RequestError."""
    write: Callable[[Answer], tuple[OutputTensor, ...]]
    optional: tuple[str, ...] = ()
    """Inputs that metadata does not tell, because a request made of what it tells is to be a good one."""

    def check_inputs(self, inputs: Inputs) -> None:
        """Raises MalformedRequestError for an input that the task does not take."""
        taken = [*(tensor.name for tensor in self.inputs), *self.optional]
        if not inputs.names <= set(taken):
            raise MalformedRequestError(f"`inputs` has one that this task does not take; it takes: {', '.join(taken)}")
        if "attention_mask" in inputs and "input_ids" not in inputs:
            raise InvalidInputError("input attention_mask goes with input_ids; leave it out")


def _bytes(*names: str) -> tuple[TensorType, ...]:
    return tuple(TensorType(name, "BYTES", (-1,)) for name in names)


def _one(name: str) -> TensorType:
    return TensorType(name, "BYTES", (1,))


def _embedding(inputs: Inputs, chosen: EmbeddingFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), chosen.options()


def _similarity(inputs: Inputs, chosen: PromptFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    compared = (inputs.one_text("source_sentence"), *inputs.texts("sentences"))
    return compared, SimilarityOptions(chosen.prompt_name)


def _token_embedding(inputs: Inputs, chosen: PromptFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), TokenEmbeddingOptions(chosen.prompt_name)


def _sparse(inputs: Inputs, chosen: PromptFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), SparseEmbeddingOptions(chosen.prompt_name)


def _classification(inputs: Inputs, chosen: ClassificationFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    classified = inputs.pairs("text", "text_pair") if "text_pair" in inputs else inputs.texts_or_ids()
    return classified, chosen.options()


def _rerank(inputs: Inputs, chosen: RerankFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return (inputs.one_text("query"), *inputs.texts("documents")), chosen.options()


def _zero_shot(inputs: Inputs, chosen: ZeroShotFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    labels = inputs.words("candidate_labels")
    if len(set(labels)) != len(labels):
        raise MalformedRequestError("input candidate_labels has a label twice")
    return inputs.texts("text"), chosen.options(labels)


def _entities(inputs: Inputs, chosen: EntityFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    options = chosen.options()
    if "ignore_labels" in inputs:
        options = replace(options, ignore_labels=inputs.words("ignore_labels"))
    return inputs.texts("text"), options


def _fills(inputs: Inputs, chosen: FillMaskFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    options = chosen.options()
    if "targets" in inputs:
        options = replace(options, targets=inputs.words("targets"))
    return inputs.texts("text"), options


def _questions(inputs: Inputs, chosen: QuestionFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    inputs.words("question"), inputs.words("context")
    return inputs.pairs("question", "context"), chosen.options()


def _generation(inputs: Inputs, chosen: GenerationFields) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), chosen.options()


def _numbers(name: str) -> Callable[[Answer], tuple[OutputTensor, ...]]:
    return lambda answer: (array(name, cast(FloatArray, answer.output)),)


def _offsets(lengths: Sequence[int]) -> OutputTensor:
    """(n + 1,) int32: where each input's part starts, and the last one's ends."""
    return array("offsets", np.cumsum([0, *lengths], dtype=np.int32))


def _write_tokens(answer: Answer) -> tuple[OutputTensor, ...]:
    vectors = cast("Sequence[FloatArray]", answer.output)
    return array("token_embedding", np.concatenate(vectors)), _offsets([len(each) for each in vectors])


def _write_scores(answer: Answer) -> tuple[OutputTensor, ...]:
    return (array("score", cast(Ranking, answer.output).scores),)


def _write_sparse(answer: Answer) -> tuple[OutputTensor, ...]:
    vectors = cast("Sequence[SparseVector]", answer.output)
    indices = np.concatenate([each.indices for each in vectors])
    values = np.concatenate([each.values for each in vectors])
    return array("indices", indices), array("values", values), _offsets([len(each.indices) for each in vectors])


def _write_labels(answer: Answer) -> tuple[OutputTensor, ...]:
    """Of each input its labels, best first; of all inputs as many."""
    found = cast("Sequence[Sequence[LabelScore]]", answer.output)
    labels = [each.label for scores in found for each in scores]
    numbers = np.array([[each.score for each in scores] for scores in found], np.float32)
    return texts("label", labels, numbers.shape), array("score", numbers)


def _json(name: str) -> Callable[[Answer], tuple[OutputTensor, ...]]:
    """Of each input its answer as JSON, with the names of `serve_app.outputs`."""
    return lambda answer: (texts(name, [encode(each).decode() for each in cast("Sequence[Any]", answer.output)]),)


def _write_generated(answer: Answer) -> tuple[OutputTensor, ...]:
    found = cast("Sequence[Generated]", answer.output)
    return generated([each.text for each in found], [each.finish_reason for each in found])


def generated(told: Sequence[str], reasons: Sequence[str]) -> tuple[OutputTensor, ...]:
    return texts("generated_text", told), texts("finish_reason", reasons)


_LABELS = (TensorType("label", "BYTES", (-1, -1)), TensorType("score", "FP32", (-1, -1)))
_IDS = ("input_ids", "attention_mask")
_OFFSETS = TensorType("offsets", "INT32", (-1,))
_GENERATED = TaskTensors(
    _bytes("text"),
    _bytes("generated_text", "finish_reason"),
    _generation,
    _write_generated,
    _IDS,
)

TASK_TENSORS: Mapping[str, TaskTensors[Any]] = {
    "embedding": TaskTensors(
        _bytes("text"),
        (TensorType("embedding", "FP32", (-1, -1)),),
        _embedding,
        _numbers("embedding"),
        _IDS,
    ),
    "similarity": TaskTensors(
        (_one("source_sentence"), *_bytes("sentences")),
        (TensorType("similarity", "FP32", (-1,)),),
        _similarity,
        _numbers("similarity"),
    ),
    "token-embedding": TaskTensors(
        _bytes("text"),
        (TensorType("token_embedding", "FP32", (-1, -1)), _OFFSETS),
        _token_embedding,
        _write_tokens,
        _IDS,
    ),
    "sparse-embedding": TaskTensors(
        _bytes("text"),
        (TensorType("indices", "INT32", (-1,)), TensorType("values", "FP32", (-1,)), _OFFSETS),
        _sparse,
        _write_sparse,
        _IDS,
    ),
    "text-classification": TaskTensors(_bytes("text"), _LABELS, _classification, _write_labels, ("text_pair", *_IDS)),
    "rerank": TaskTensors(
        (_one("query"), *_bytes("documents")),
        (TensorType("score", "FP32", (-1,)),),
        _rerank,
        _write_scores,
    ),
    "zero-shot-classification": TaskTensors(_bytes("text", "candidate_labels"), _LABELS, _zero_shot, _write_labels),
    "token-classification": TaskTensors(
        _bytes("text"), _bytes("entities"), _entities, _json("entities"), ("ignore_labels",)
    ),
    "fill-mask": TaskTensors(_bytes("text"), _bytes("fills"), _fills, _json("fills"), ("targets",)),
    "question-answering": TaskTensors(_bytes("question", "context"), _bytes("answers"), _questions, _json("answers")),
    **dict.fromkeys(("text-generation", "text2text-generation", "summarization", "translation"), _GENERATED),
}

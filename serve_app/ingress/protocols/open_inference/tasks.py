"""What each task's tensors are: how its inputs become a Request, and an Answer its outputs.

Texts are BYTES in UTF-8, of any shape; `n` is how many there are. Outputs that are not numbers or texts are BYTES too,
each with the JSON of one input's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np

from serve_app.errors import EmptyInputError, InvalidInputError, MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import LongTextFields, check_query
from serve_app.ingress.protocols.open_inference.parameters import (
    ClassificationParameters,
    EmbeddingParameters,
    EntityParameters,
    FillMaskParameters,
    GenerationParameters,
    PromptParameters,
    QuestionParameters,
    RerankParameters,
    ZeroShotParameters,
)
from serve_app.ingress.protocols.open_inference.tensors import (
    InputTensor,
    OutputTensor,
    TensorType,
    array,
    texts,
    token_ids,
    without_padding,
)
from serve_app.options import (
    ClassificationOptions,
    EmbeddingOptions,
    FillMaskOptions,
    QuestionAnsweringOptions,
    RerankOptions,
    SimilarityOptions,
    SparseEmbeddingOptions,
    TaskOptions,
    TokenClassificationOptions,
    TokenEmbeddingOptions,
    ZeroShotOptions,
)
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
        """Raises RequestError if the tensor is missing, not of texts, or has an empty one."""
        found = self.any_texts(name)
        if "" in found:
            raise EmptyInputError(f"input {name} has an empty text; leave it out")
        return found

    def any_texts(self, name: str) -> tuple[str, ...]:
        """Some of them may be empty, but there must be one."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise MalformedRequestError(f"input {name} is missing")
        found = tuple(value for value in tensor.values if isinstance(value, str))
        if len(found) != len(tensor.values):
            raise InvalidInputError(f"input {name} takes texts, whose datatype is BYTES")
        if not found:
            raise EmptyInputError(f"input {name} has no text; send at least one")
        return found

    def one_text(self, name: str) -> str:
        (found,) = self._one(name, self.texts(name))
        return found

    def _one(self, name: str, found: tuple[str, ...]) -> tuple[str, ...]:
        if len(found) != 1:
            raise InvalidInputError(f"input {name} takes one text, and there are {len(found)}")
        return found

    def query_and(self, name: str) -> tuple[str, ...]:
        """`query` and then the texts `name`; either side of a pair may be empty, but not both."""
        (query,), documents = self._one("query", self.any_texts("query")), self.any_texts(name)
        check_query(query, documents, name)
        return query, *documents

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
        """Either text of a pair may be empty, but not both."""
        left, right = self.any_texts(first), self.any_texts(second)
        if len(left) != len(right):
            raise InvalidInputError(
                f"inputs {first} and {second} have {len(left)} and {len(right)} texts; send as many"
            )
        if ("", "") in zip(left, right, strict=True):
            raise EmptyInputError(f"inputs {first} and {second} have a pair of empty texts; leave it out")
        return tuple(zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class TaskTensors(Generic[ParametersT]):
    """One task: the tensors that it takes and gives, and the parameters it knows."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    parameters: type[ParametersT]
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


def _embedding(inputs: Inputs, chosen: EmbeddingParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), EmbeddingOptions(chosen.normalize, chosen.dimensions, chosen.prompt_name)


def _similarity(inputs: Inputs, chosen: PromptParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    compared = (inputs.one_text("source_sentence"), *inputs.texts("sentences"))
    return compared, SimilarityOptions(chosen.prompt_name)


def _token_embedding(inputs: Inputs, chosen: PromptParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), TokenEmbeddingOptions(chosen.prompt_name)


def _sparse(inputs: Inputs, chosen: PromptParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.texts_or_ids(), SparseEmbeddingOptions(chosen.prompt_name)


def _classification(inputs: Inputs, chosen: ClassificationParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    classified = inputs.pairs("text", "text_pair") if "text_pair" in inputs else inputs.texts_or_ids()
    return classified, ClassificationOptions(chosen.top_k, chosen.function_to_apply, chosen.over_windows)


def _rerank(inputs: Inputs, chosen: RerankParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    return inputs.query_and("documents"), RerankOptions(bool(chosen.raw_scores))


def _zero_shot(inputs: Inputs, chosen: ZeroShotParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    labels = inputs.texts("candidate_labels")
    if len(set(labels)) != len(labels):
        raise MalformedRequestError("input candidate_labels has a label twice")
    return inputs.texts("text"), ZeroShotOptions(labels, bool(chosen.multi_label), chosen.hypothesis_template)


def _entities(inputs: Inputs, chosen: EntityParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    ignored = inputs.texts("ignore_labels") if "ignore_labels" in inputs else ("O",)
    return inputs.texts("text"), TokenClassificationOptions(chosen.aggregation_strategy or "none", ignored)


def _fills(inputs: Inputs, chosen: FillMaskParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    targets = inputs.texts("targets") if "targets" in inputs else None
    return inputs.texts("text"), FillMaskOptions(chosen.top_k or FillMaskOptions().top_k, targets)


def _questions(inputs: Inputs, chosen: QuestionParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
    usual = QuestionAnsweringOptions()
    options = QuestionAnsweringOptions(
        top_k=chosen.top_k or usual.top_k,
        doc_stride=chosen.doc_stride,
        max_seq_len=chosen.max_seq_len,
        max_answer_len=chosen.max_answer_len or usual.max_answer_len,
        max_question_len=chosen.max_question_len or usual.max_question_len,
        handle_impossible_answer=bool(chosen.handle_impossible_answer),
    )
    inputs.texts("question"), inputs.texts("context")
    return inputs.pairs("question", "context"), options


def _generation(inputs: Inputs, chosen: GenerationParameters) -> tuple[tuple[TextInput, ...], TaskOptions]:
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
    GenerationParameters,
    _generation,
    _write_generated,
    _IDS,
)

TASK_TENSORS: Mapping[str, TaskTensors[Any]] = {
    "embedding": TaskTensors(
        _bytes("text"),
        (TensorType("embedding", "FP32", (-1, -1)),),
        EmbeddingParameters,
        _embedding,
        _numbers("embedding"),
        _IDS,
    ),
    "similarity": TaskTensors(
        (_one("source_sentence"), *_bytes("sentences")),
        (TensorType("similarity", "FP32", (-1,)),),
        PromptParameters,
        _similarity,
        _numbers("similarity"),
    ),
    "token-embedding": TaskTensors(
        _bytes("text"),
        (TensorType("token_embedding", "FP32", (-1, -1)), _OFFSETS),
        PromptParameters,
        _token_embedding,
        _write_tokens,
        _IDS,
    ),
    "sparse-embedding": TaskTensors(
        _bytes("text"),
        (TensorType("indices", "INT32", (-1,)), TensorType("values", "FP32", (-1,)), _OFFSETS),
        PromptParameters,
        _sparse,
        _write_sparse,
        _IDS,
    ),
    "text-classification": TaskTensors(
        _bytes("text"), _LABELS, ClassificationParameters, _classification, _write_labels, ("text_pair", *_IDS)
    ),
    "rerank": TaskTensors(
        (_one("query"), *_bytes("documents")),
        (TensorType("score", "FP32", (-1,)),),
        RerankParameters,
        _rerank,
        _write_scores,
    ),
    "zero-shot-classification": TaskTensors(
        _bytes("text", "candidate_labels"), _LABELS, ZeroShotParameters, _zero_shot, _write_labels
    ),
    "token-classification": TaskTensors(
        _bytes("text"), _bytes("entities"), EntityParameters, _entities, _json("entities"), ("ignore_labels",)
    ),
    "fill-mask": TaskTensors(_bytes("text"), _bytes("fills"), FillMaskParameters, _fills, _json("fills"), ("targets",)),
    "question-answering": TaskTensors(
        _bytes("question", "context"), _bytes("answers"), QuestionParameters, _questions, _json("answers")
    ),
    **dict.fromkeys(("text-generation", "text2text-generation", "summarization", "translation"), _GENERATED),
}

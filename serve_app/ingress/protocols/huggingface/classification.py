"""Sequence classifiers, whose one head is read three ways: labels, labels of the client's own, and relevance.

`candidate_labels` ask for zero-shot classification, `source_sentence` and `sentences` for the relevance of each
sentence to the first one (the order is the client's), and anything else for the labels of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import BaseModel, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import MalformedRequestError
from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import (
    SIMILARITY_SCHEMA,
    WORD_SCHEMA,
    WORDS_SCHEMA,
    LongTextFields,
    SimilarityInputs,
    documented,
    items_schema,
    read_similarity,
    text,
    words,
)
from serve_app.ingress.protocols.huggingface.body import Several, SeveralReader, TaskBody
from serve_app.ingress.protocols.task_options import ClassificationFields, RerankFields, ZeroShotFields, refuse_others
from serve_app.outputs import LabelScore, Ranking
from serve_app.types import Answer, Request, TextInput


class LabelScoreBody(BaseModel):
    """A label and its score."""

    label: str
    score: float


class PipelineLabelsBody(BaseModel):
    """Candidate labels as transformers' pipeline tells them, best first; for clients that read no other shape."""

    sequence: str
    labels: list[str]
    scores: list[float]


def label_scores(scores: Sequence[LabelScore]) -> list[dict[str, str | float]]:
    return [{"label": each.label, "score": each.score} for each in scores]


def text_or_pair(value: Any, where: str) -> TextInput:
    """A text; a pair as `{"text": …, "text_pair": …}` or as a list of two texts.

    A pair without a second text is a text, as for the pipeline.
    """
    if type(value) is dict:
        first = text(value.get("text"), f"{where}.text")
        second = value.get("text_pair")
        return (first, text(second, f"{where}.text_pair")) if second else first
    if type(value) is list:
        if len(value) != 2:
            raise MalformedRequestError(f"`{where}` is a list of {len(value)}; a pair is a list of two texts")
        first, second = text(value[0], f"{where}[0]"), text(value[1], f"{where}[1]")
        return (first, second) if second else first
    return text(value, where)


_several = SeveralReader(text_or_pair)


def read_texts_pairs_or_similarity(value: Any, info: ValidationInfo) -> Several | SimilarityInputs:
    """Raises EmptyInputError or MalformedRequestError."""
    if type(value) is dict and "text" not in value:
        return read_similarity(value, info)
    return _several(value, info)


def read_labels(value: Any, info: ValidationInfo) -> tuple[str, ...] | None:
    """A list of labels, or labels with commas between them, as the pipeline takes them."""
    if value is None:
        return None
    name = info.field_name or "candidate_labels"
    if type(value) is str:
        value = [label.strip() for label in value.split(",") if label.strip()]
    return words(value, name, info)


_PAIR = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "text_pair": {"type": ["string", "null"]}},
    "required": ["text"],
}
_LISTED = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}

TextsPairsOrSimilarity = Annotated[
    Several | SimilarityInputs,
    PlainValidator(read_texts_pairs_or_similarity),
    WithJsonSchema(
        {
            "anyOf": [
                {"description": "A text.", "type": "string"},
                {"description": "A text or a pair of texts.", **_PAIR},
                {
                    "description": "Several texts or pairs of texts.",
                    **items_schema({"anyOf": [{"type": "string"}, _PAIR, _LISTED]}),
                },
                SIMILARITY_SCHEMA,
            ]
        }
    ),
]
Labels = Annotated[
    tuple[str, ...] | None,
    PlainValidator(read_labels),
    WithJsonSchema(
        {
            "description": "Labels to choose from, for zero-shot classification: a list, or a text with commas.",
            "anyOf": [WORD_SCHEMA, WORDS_SCHEMA, {"type": "null"}],
        }
    ),
]


class ClassificationParameters(ClassificationFields, ZeroShotFields, RerankFields):  # type: ignore[misc]
    """Options of the model's own labels, of `candidate_labels`, or of the relevance of sentences."""

    candidate_labels: Labels = None


class ClassificationBody(LongTextFields, TaskBody):
    """Texts to classify, or sentences to compare with the first one."""

    model_config = documented(inputs="I like you.", parameters={"top_k": 2})

    inputs: TextsPairsOrSimilarity
    parameters: ClassificationParameters | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        chosen = self.parameters or ClassificationParameters()
        long = self.over(chosen)
        if isinstance(self.inputs, SimilarityInputs):
            refuse_others(chosen, "rerank", part="parameters")
            inputs = (self.inputs.source_sentence, *self.inputs.sentences)
            return long.request(request_id, model, "rerank", inputs, RerankFields.options(chosen))
        if chosen.candidate_labels is None:
            refuse_others(chosen, "text-classification", part="parameters")
            classes = ClassificationFields.options(chosen)
            return long.request(request_id, model, "text-classification", self.inputs.values, classes)
        refuse_others(chosen, "zero-shot-classification", "candidate_labels", part="parameters")
        if any(not isinstance(value, str) for value in self.inputs.values):
            raise MalformedRequestError("`inputs` of a zero-shot classification are texts, not pairs")
        labels = ZeroShotFields.options(chosen, chosen.candidate_labels)
        return long.request(request_id, model, "zero-shot-classification", self.inputs.values, labels)

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[[{label, score}]]`; for zero-shot classification of one text `[{label, score}]`; `[f]` for sentences."""
        if isinstance(self.inputs, SimilarityInputs):
            return encode(cast(Ranking, answer.output).scores)
        found = [label_scores(scores) for scores in cast("Sequence[Sequence[LabelScore]]", answer.output)]
        return self.inputs.encode(found) if request.task == "zero-shot-classification" else encode(found)


_CLIENT = re.compile(rb"(?:^|[ ;])(hf_hub|@huggingface/inference)/(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")
_READS_OBJECTS_SINCE = {b"hf_hub": (1, 1, 5), b"@huggingface/inference": (4, 5, 0)}
"""The first version of each client, by its name in `user-agent`, that reads `[{label, score}]` of a zero-shot
classification. Those before it read the pipeline's shape, `@huggingface/inference` in a list even of one text."""


def zero_shot_writer(
    headers: Mapping[bytes, bytes],
) -> Callable[[ClassificationBody, Request, Answer], bytes]:
    """How the answer of a zero-shot classification is written for the client that sent `headers`."""
    found = _CLIENT.search(headers.get(b"user-agent", b""))
    if found is None:
        return ClassificationBody.write
    name, *version = found.groups(b"0")
    if tuple(map(int, version)) >= _READS_OBJECTS_SINCE[name]:
        return ClassificationBody.write
    return write_pipeline_labels if name == b"hf_hub" else write_listed_pipeline_labels


def write_pipeline_labels(body: ClassificationBody, request: Request, answer: Answer) -> bytes:
    """`{sequence, labels, scores}`, best first, in a list where `inputs` is one."""
    assert isinstance(body.inputs, Several)
    return body.inputs.encode(_pipeline_labels(request, answer))


def write_listed_pipeline_labels(body: ClassificationBody, request: Request, answer: Answer) -> bytes:
    """`[{sequence, labels, scores}]`."""
    return encode(_pipeline_labels(request, answer))


def _pipeline_labels(request: Request, answer: Answer) -> list[dict[str, Any]]:
    found = cast("Sequence[Sequence[LabelScore]]", answer.output)
    return [
        {"sequence": text, "labels": [each.label for each in scores], "scores": [each.score for each in scores]}
        for text, scores in zip(request.inputs, found, strict=True)
    ]

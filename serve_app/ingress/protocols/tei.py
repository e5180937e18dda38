"""Text Embeddings Inference: `/embed`, `/embed_all`, `/embed_sparse`, `/similarity`, `/predict`, `/rerank`.

Shapes and defaults are those of https://github.com/huggingface/text-embeddings-inference (router/src/http/types.rs);
`long_texts` and `stride` are ours.
`/tokenize` and `/decode` are in `tei_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationInfo, WithJsonSchema

from serve_app.errors import EmptyInputError, MalformedRequestError
from serve_app.ingress.dialect import Dialect
from serve_app.ingress.encoding import encode
from serve_app.ingress.inference import Inference
from serve_app.ingress.protocols import tei_tokens
from serve_app.ingress.protocols.envelope import TEIErrorBody, write_tei_error
from serve_app.ingress.protocols.fields import (
    TEXT_SCHEMA,
    InferenceBody,
    Inputs,
    Normalize,
    Similarity,
    check_count,
    documented,
    items_schema,
    text,
)
from serve_app.ingress.protocols.ranks import Rank, RankFields, RerankList, ranked, write_ranks
from serve_app.ingress.protocols.sparse import SparseEntry, sparse_entries
from serve_app.ingress.protocols.task_options import ClassificationFields, EmbeddingFields, PromptFields
from serve_app.ingress.routes import ANY_MODEL, COMPUTE_FAILURES, Route
from serve_app.options import SimilarityOptions, SparseEmbeddingOptions, TokenEmbeddingOptions
from serve_app.outputs import FloatArray, LabelScore
from serve_app.types import Answer, Request, TextInput

DIALECT = Dialect("Text Embeddings Inference", write_tei_error, TEIErrorBody)


class EmbedBody(EmbeddingFields, InferenceBody):
    """Texts to embed."""

    model_config = documented(inputs=["What is Deep Learning?", "What is a replica?"])

    inputs: Inputs
    normalize: Normalize = True

    def to_request(self, request_id: str, model: str) -> Request:
        return self.request(request_id, model, "embedding", self.inputs, self.options())


class EmbedAllBody(PromptFields, InferenceBody):
    """Texts whose every token is to be embedded."""

    model_config = documented(inputs=["What is Deep Learning?"])

    inputs: Inputs

    def to_request(self, request_id: str, model: str) -> Request:
        options = TokenEmbeddingOptions(self.prompt_name)
        return self.request(request_id, model, "token-embedding", self.inputs, options)


class EmbedSparseBody(PromptFields, InferenceBody):
    """Texts to embed in as many dimensions as the vocabulary has."""

    model_config = documented(inputs=["What is Deep Learning?"])

    inputs: Inputs

    def to_request(self, request_id: str, model: str) -> Request:
        options = SparseEmbeddingOptions(self.prompt_name)
        return self.request(request_id, model, "sparse-embedding", self.inputs, options)


class SimilarityBody(InferenceBody):
    """Sentences to compare."""

    model_config = documented(inputs={"source_sentence": "What is Deep Learning?", "sentences": ["What is a replica?"]})

    inputs: Similarity
    parameters: PromptFields | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        parameters = self.parameters or PromptFields()
        inputs = (self.inputs.source_sentence, *self.inputs.sentences)
        return parameters.request(request_id, model, "similarity", inputs, SimilarityOptions(parameters.prompt_name))


class Classified(tuple[TextInput, ...]):
    """Texts and pairs to classify that were sent one by one."""


class ClassifiedBatch(Classified):
    """Texts and pairs that were sent as a batch, whose answer has one more level."""


def read_classified(value: Any, info: ValidationInfo) -> Classified:
    """A text, a list of two texts that is a pair, or a batch: a list of lists of one or two texts."""
    name = info.field_name or "inputs"
    if type(value) is not list:
        return Classified((text(value, name),))
    if not value:
        raise EmptyInputError(f"`{name}` is empty; send a text, a pair of texts or a batch of these")
    if all(type(item) is list for item in value):
        check_count(value, info)
        return ClassifiedBatch(_text_or_pair(item, f"{name}[{index}]") for index, item in enumerate(value))
    return Classified((_text_or_pair(value, name),))


def _text_or_pair(value: list[Any], where: str) -> TextInput:
    if not value:
        raise EmptyInputError(f"`{where}` is an empty list; leave it out")
    if len(value) > 2:
        raise MalformedRequestError(f"`{where}` has {len(value)} texts; one is a text, two are a pair")
    if len(value) == 1:
        return text(value[0], f"{where}[0]")
    first, second = (text(item, f"{where}[{index}]") for index, item in enumerate(value))
    return first, second


_PAIR_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": TEXT_SCHEMA, "minItems": 1, "maxItems": 1},
        {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
    ]
}

ClassifiedInputs = Annotated[
    Classified,
    PlainValidator(read_classified),
    WithJsonSchema(
        {
            "description": "A text; a pair of texts as a list of two; or a batch, as a list of lists of one or two.",
            "anyOf": [TEXT_SCHEMA, _PAIR_SCHEMA, items_schema(_PAIR_SCHEMA)],
        }
    ),
]


class PredictBody(ClassificationFields, InferenceBody):
    """Texts and pairs of texts to classify."""

    model_config = documented(inputs="I like you.")

    inputs: ClassifiedInputs

    def to_request(self, request_id: str, model: str) -> Request:
        return self.request(request_id, model, "text-classification", tuple(self.inputs), self.options())


class RerankBody(RankFields):
    """A query, and texts to put in order by their relevance to it."""

    model_config = ConfigDict(
        json_schema_extra=ranked(query="What is Deep Learning?", texts=["Deep Learning is…", "A cheese."])
    )


class Prediction(BaseModel):
    """A label and its score."""

    score: float
    label: str


def write_output(body: InferenceBody, request: Request, answer: Answer) -> bytes:
    """The numbers alone: `[[f]]` for embeddings, `[f]` for similarities."""
    return encode(answer.output)


def write_all(body: EmbedAllBody, request: Request, answer: Answer) -> bytes:
    """`[[[f]]]`: for each input, for each token its vector."""
    return encode([np.ascontiguousarray(vectors) for vectors in cast("Sequence[FloatArray]", answer.output)])


def write_sparse(body: EmbedSparseBody, request: Request, answer: Answer) -> bytes:
    return encode(sparse_entries(answer))


def write_predictions(body: PredictBody, request: Request, answer: Answer) -> bytes:
    """`[{score, label}]`, best first; for a batch a list of these."""
    found = cast("Sequence[Sequence[LabelScore]]", answer.output)
    written = [[{"score": each.score, "label": each.label} for each in scores] for scores in found]
    return encode(written if isinstance(body.inputs, ClassifiedBatch) else written[0])


def routes() -> tuple[Route, ...]:
    endpoints: tuple[tuple[str, Inference[Any], str, Any], ...] = (
        ("/embed", Inference(EmbedBody, write_output), "Embed texts", list[list[float]]),
        ("/embed_all", Inference(EmbedAllBody, write_all), "Embed every token", list[list[list[float]]]),
        ("/embed_sparse", Inference(EmbedSparseBody, write_sparse), "Embed sparsely", list[list[SparseEntry]]),
        ("/similarity", Inference(SimilarityBody, write_output), "Compare one sentence with others", list[float]),
        (
            "/predict",
            Inference(PredictBody, write_predictions),
            "Classify texts",
            list[Prediction] | list[list[Prediction]],
        ),
        ("/rerank", Inference(RerankBody, write_ranks), "Order texts by relevance", list[Rank] | RerankList),
    )
    computed = (
        Route("POST", place + path, endpoint, DIALECT, summary, answer, endpoint.body, failures=COMPUTE_FAILURES)
        for place in ANY_MODEL
        for path, endpoint, summary, answer in endpoints
    )
    return (*computed, *tei_tokens.routes(DIALECT))

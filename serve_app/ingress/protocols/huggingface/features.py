"""Feature extraction and sentence similarity of embedding models, and sparse embeddings.

The task is told by the shape of `inputs`: an object is a comparison, anything else is embedded.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import Field

from serve_app.ingress.encoding import encode
from serve_app.ingress.protocols.fields import EncodingFormat, Inputs, InputsOrSimilarity, SimilarityInputs, documented
from serve_app.ingress.protocols.huggingface.body import TaskBody
from serve_app.ingress.protocols.sparse import sparse_entries
from serve_app.ingress.protocols.task_options import EmbeddingFields, PromptFields, refuse_others
from serve_app.options import EmbeddingOptions, SimilarityOptions, SparseEmbeddingOptions
from serve_app.types import Answer, Request

T = TypeVar("T")


class FeatureFields(EmbeddingFields):
    """Options of a feature extraction; a comparison takes those that are about the texts."""

    encoding_format: EncodingFormat | None = Field(
        None, description="Taken for compatibility: the answer is always numbers, which is all that the client reads."
    )


class FeatureBody(FeatureFields, TaskBody):
    """Texts to embed, or sentences to compare."""

    model_config = documented(inputs="What is Deep Learning?", normalize=True)

    inputs: InputsOrSimilarity
    parameters: FeatureFields | None = Field(
        None, description="The same options again, where a client nests them; those beside `inputs` win."
    )

    def to_request(self, request_id: str, model: str) -> Request:
        nested = self.parameters or FeatureFields()
        prompt_name = _first(self.prompt_name, nested.prompt_name)
        texts = self.over(nested)
        if isinstance(self.inputs, SimilarityInputs):
            refuse_others(self, "similarity", "inputs", "parameters", "model", "encoding_format")
            refuse_others(nested, "similarity", "encoding_format", part="parameters")
            inputs = (self.inputs.source_sentence, *self.inputs.sentences)
            return texts.request(request_id, model, "similarity", inputs, SimilarityOptions(prompt_name))
        normalize = _first(self.normalize, nested.normalize)
        options = EmbeddingOptions(normalize, _first(self.dimensions, nested.dimensions), prompt_name)
        return texts.request(request_id, model, "embedding", self.inputs, options)

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[[f]]` for feature extraction, `[f]` for sentence similarity."""
        return encode(answer.output)


class SparseBody(PromptFields, TaskBody):
    """Texts to embed in as many dimensions as the vocabulary has."""

    model_config = documented(inputs="What is Deep Learning?")

    inputs: Inputs
    parameters: PromptFields | None = None

    def to_request(self, request_id: str, model: str) -> Request:
        nested = self.parameters or PromptFields()
        options = SparseEmbeddingOptions(_first(self.prompt_name, nested.prompt_name))
        return self.over(nested).request(request_id, model, "sparse-embedding", self.inputs, options)

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[[{index, value}]]`, as Text Embeddings Inference does."""
        return encode(sparse_entries(answer))


def _first(outer: T | None, nested: T | None) -> T | None:
    return nested if outer is None else outer

"""What a text of the corpus becomes for each task: a body on the wire, and the same request for the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from serve_app.options import (
    ClassificationOptions,
    FillMaskOptions,
    QuestionAnsweringOptions,
    RerankOptions,
    SparseEmbeddingOptions,
    TaskOptions,
    TokenClassificationOptions,
    TokenEmbeddingOptions,
    ZeroShotOptions,
)
from serve_app.types import TextInput

Texts: TypeAlias = Sequence[str]

QUERY = "Which text tells what a replica is?"
LABELS = ("science", "politics", "sport")
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Load:
    """`body(texts, mask)` for `path`; `inputs(texts, mask)` and `options` are the same as the ingress would read it.

    `mask` is the model's mask token, empty where it has none. `options` is None for tasks that generate, which have no
    ceiling here. `per_text`: the answer has one element for each text.
    """

    path: str
    body: Callable[[Texts, str], Mapping[str, Any]]
    inputs: Callable[[Texts, str], Sequence[TextInput]]
    options: TaskOptions | None
    per_text: bool = True


def _same(texts: Texts, mask: str) -> Sequence[str]:
    return texts


def _masked(texts: Texts, mask: str) -> Sequence[str]:
    return [f"{mask} {text}" for text in texts]


def _questions(texts: Texts, mask: str) -> list[dict[str, str]]:
    return [{"question": QUERY, "context": text} for text in texts]


def _generating(texts: Texts, mask: str) -> Mapping[str, Any]:
    parameters = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "truncate": True}
    return {"inputs": list(texts), "parameters": parameters}


LOADS: Mapping[str, Load] = {
    "token-embedding": Load(
        "/models/{model}/embed_all",
        lambda texts, mask: {"inputs": texts, "truncate": True},
        _same,
        TokenEmbeddingOptions(),
    ),
    "sparse-embedding": Load(
        "/models/{model}/embed_sparse",
        lambda texts, mask: {"inputs": texts, "truncate": True},
        _same,
        SparseEmbeddingOptions(),
    ),
    "text-classification": Load(
        "/models/{model}/predict",
        lambda texts, mask: {"inputs": [[text] for text in texts], "truncate": True},
        _same,
        ClassificationOptions(),
    ),
    "rerank": Load(
        "/models/{model}/rerank",
        lambda texts, mask: {"query": QUERY, "texts": texts, "truncate": True},
        lambda texts, mask: [QUERY, *texts],
        RerankOptions(),
    ),
    "zero-shot-classification": Load(
        "/models/{model}",
        lambda texts, mask: {"inputs": texts, "parameters": {"candidate_labels": LABELS}},
        _same,
        ZeroShotOptions(LABELS),
    ),
    "token-classification": Load(
        "/models/{model}",
        lambda texts, mask: {"inputs": texts, "parameters": {"aggregation_strategy": "simple"}},
        _same,
        TokenClassificationOptions("simple"),
    ),
    "fill-mask": Load(
        "/models/{model}",
        lambda texts, mask: {"inputs": _masked(texts, mask)},
        _masked,
        FillMaskOptions(),
    ),
    "question-answering": Load(
        "/models/{model}",
        lambda texts, mask: {"inputs": _questions(texts, mask)},
        lambda texts, mask: [(QUERY, text) for text in texts],
        QuestionAnsweringOptions(),
    ),
    "text-generation": Load("/models/{model}", _generating, _same, None, per_text=False),
    "text2text-generation": Load("/models/{model}", _generating, _same, None, per_text=False),
    "summarization": Load("/models/{model}", _generating, _same, None, per_text=False),
    "translation": Load("/models/{model}", _generating, _same, None, per_text=False),
}

"""The tasks by name, and which of them a model that is served for one task can answer."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.tasks.embedding import Embedding, Similarity
from serve_app.tasks.fill_mask import FillMask
from serve_app.tasks.question_answering import QuestionAnswering
from serve_app.tasks.rerank import Rerank
from serve_app.tasks.sparse_embedding import SparseEmbedding
from serve_app.tasks.task import Task
from serve_app.tasks.text_classification import TextClassification
from serve_app.tasks.token_classification import TokenClassification
from serve_app.tasks.token_embedding import TokenEmbedding
from serve_app.tasks.zero_shot import ZeroShotClassification

_ENCODING: tuple[Task, ...] = (
    Embedding(),
    Similarity(),
    TokenEmbedding(),
    SparseEmbedding(),
    TextClassification(),
    Rerank(),
    ZeroShotClassification(),
    TokenClassification(),
    FillMask(),
    QuestionAnswering(),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ENCODING}
"""Tasks that are answered at once; those that generate are in `serve_app.tasks.generation`."""

_REWRITING = frozenset({"text2text-generation", "summarization", "translation"})

ANSWERED_BY: Mapping[str, frozenset[str]] = {
    "embedding": frozenset({"embedding", "similarity", "token-embedding"}),
    "sparse-embedding": frozenset({"sparse-embedding"}),
    "text-classification": frozenset({"text-classification", "rerank", "zero-shot-classification"}),
    "rerank": frozenset({"rerank", "text-classification"}),
    "zero-shot-classification": frozenset({"zero-shot-classification", "text-classification"}),
    "token-classification": frozenset({"token-classification"}),
    "fill-mask": frozenset({"fill-mask", "sparse-embedding"}),
    "question-answering": frozenset({"question-answering"}),
    "text-generation": frozenset({"text-generation"}),
    **dict.fromkeys(_REWRITING, _REWRITING),
}
"""Tasks that a model of each configured task answers. A classifier is refused by `prepare` where it has no label that
the task needs: one label to rerank, one of entailment for zero-shot classification."""

"""The tasks by name, and which of them a model that is served for one task can answer."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.tasks.embedding import Embedding, Similarity
from serve_app.tasks.task import Task

TASKS: Mapping[str, Task] = {task.name: task for task in (Embedding(), Similarity())}

_REWRITING = frozenset({"text2text-generation", "summarization", "translation"})

ANSWERED_BY: Mapping[str, frozenset[str]] = {
    "embedding": frozenset({"embedding", "similarity"}),
    "text-generation": frozenset({"text-generation"}),
    **dict.fromkeys(_REWRITING, _REWRITING),
}
"""Tasks that a model of each configured task answers."""

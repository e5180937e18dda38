"""What Text Embeddings Inference takes at the root of a model that reranks: a query and texts."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from serve_app.ingress.protocols.fields import PartOfBody
from serve_app.ingress.protocols.huggingface.body import TaskBody
from serve_app.ingress.protocols.ranks import RankFields, ranked, write_ranks
from serve_app.types import Answer, Request


class QueryBody(PartOfBody):
    """Tells a ranking from the other bodies for models that rerank."""

    query: Any = None


class RankingBody(RankFields, TaskBody):
    """A query, and texts to put in order by their relevance to it."""

    model_config = ConfigDict(
        json_schema_extra=ranked(query="What is Deep Learning?", texts=["Deep Learning is…", "A cheese."])
    )

    def write(self, request: Request, answer: Answer) -> bytes:
        """`[{index, score, text?}]`, best first; of `documents` as at /v1/rerank."""
        return write_ranks(self, request, answer)

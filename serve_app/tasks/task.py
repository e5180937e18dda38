"""What a task is: the three steps that make an answer out of a request, and nothing about transport."""

from __future__ import annotations

from typing import Protocol

from serve_app.types import FloatArray, ModelCard, Request, TokenizeRequest


class Task(Protocol):
    """Stateless; one instance serves every request of its task."""

    name: str
    head: str
    """Name of the head that the model replica applies, a key of `serve_app.tasks.heads.HEADS`."""

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        """What to tokenize for this request. Raises RequestError if the request makes no sense for this model."""

    def postprocess(self, request: Request, card: ModelCard, rows: FloatArray) -> FloatArray:
        """The answer, from the rows (n, d) float32 that the head left of the request's n sequences."""

"""What a task is: the steps that make an answer out of a request, and nothing about transport.

prepare ........ texts in (ingress)
arguments ...... what the head needs to know beside tokens (ingress)
head ........... on the device (model replica; `serve_app.tasks.heads`)
postprocess .... answer out (ingress)
"""

from __future__ import annotations

from typing import Protocol

from serve_app.outputs import TaskOutput
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, HeadArguments, ModelCard, Request, TokenizeRequest


class Task(Protocol):
    """Stateless; one instance serves every request of its task."""

    name: str
    head: str
    """Name of the head that the model replica applies, a key of `serve_app.tasks.heads.HEADS`."""
    needs_vocabulary: bool
    """Whether `arguments` and `postprocess` are given the model's vocabulary."""

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        """What to tokenize for this request. Raises RequestError if the request makes no sense for this model."""

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> HeadArguments | None:
        """What the head needs to know. Raises RequestError."""

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> TaskOutput:
        """The answer, from what the head left of the request's sequences. Raises RequestError."""

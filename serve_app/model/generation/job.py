"""One answer that is asked for, and what can make it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from serve_app.options import GenerationOptions
from serve_app.outputs import GeneratedPiece


@dataclass(frozen=True, slots=True, eq=False)
class GenerationJob:
    """`input_ids` is one prompt, or what an encoder reads; `deadline` on time.monotonic's clock."""

    input_ids: tuple[int, ...]
    options: GenerationOptions
    deadline: float | None = None
    priority: Literal["interactive", "bulk"] = "interactive"


class Generator(Protocol):
    """Makes answers, many at once. Belongs to one event loop."""

    def start(self) -> None:
        """Start computing; call it on the event loop that `generate` is used on."""

    def close(self) -> None:
        """Fail what is under way and stop. May come from any thread."""

    def check(self) -> None:
        """Raises UnavailableError if nothing can be answered any more."""

    def generate(self, job: GenerationJob) -> AsyncIterator[GeneratedPiece]:
        """The answer's pieces as they are made; closing the iterator gives up the job's place at the next step.

        Raises InputTooLongError and InvalidInputError for what can never be answered, OverloadedError where the queue
        is full, DeadlineExceededError, ModelFailureError where this job failed, UnavailableError.
        """

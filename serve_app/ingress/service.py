"""What the HTTP edge asks of the rest of the application, and all that it knows of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.cache.status import ModelOnNode
from serve_app.config import IngressSettings
from serve_app.errors import ModelNotFoundError, UnavailableError
from serve_app.outputs import GeneratedPiece
from serve_app.types import Answer, ModelCard, ModelState, Request, TokenIds, Usage, Version


def check_model(name: str | None, models: Sequence[str]) -> None:
    """Raises ModelNotFoundError, which does not repeat a name that came from a client.

    Raises UnavailableError while no model at all is deployed.
    """
    if not models:
        raise UnavailableError("no model is deployed yet", retry_after_s=1.0)
    if name not in models:
        raise ModelNotFoundError(f"no model of that name is served; there is: {', '.join(models)}")


def served_name(name: str, service: Service) -> str:
    """The name that the model is served under. Raises ModelNotFoundError where it is neither a name nor an alias."""
    served = service.aliases.get(name, name)
    check_model(served, service.models)
    return served


@dataclass(slots=True)
class SettingsRef:
    """The settings in force: whoever reconfigures replaces `current`, and each HTTP request reads it once."""

    current: IngressSettings


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model as `/info` tells it, of a version that answers now.

    `state` is None while no replica of the model has answered yet.
    """

    card: ModelCard
    state: ModelState | None = None
    version: Version | None = None


@dataclass(frozen=True, slots=True)
class TextToken:
    """One token of a text; `start` and `stop` in bytes of the text in UTF-8, None for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Service(Protocol):
    """The models behind the edge. Every method may be called concurrently, and its caller may be cancelled."""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models that are served now, in the order of the configuration."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names that a request may give a model, each with the model's own. All other methods take the latter."""

    async def card(self, name: str) -> ModelCard:
        """Raises ModelNotFoundError, or UnavailableError while the model's files have not been read."""

    async def answer(self, request: Request) -> Answer:
        """Compute one request; `serve_app.outputs.TaskOutput` says what `output` is for each task.

        What it costs is counted in `request.usage`, whatever comes of it. Raises ServeAppError. Cancelling the caller
        cancels the work.
        """

    async def estimate(self, request: Request) -> int:
        """Tokens that computing the request will take, roughly. Raises what `answer` would, before it computes."""

    def stream(self, request: Request) -> AsyncIterator[GeneratedPiece]:
        """The one input's answer piece by piece, for tasks that generate.

        Iterating raises ServeAppError, before the first piece or later. Closing the iterator cancels the work. Each
        token is counted in `request.usage` as it comes.
        """

    async def tokenize(
        self, model: str, texts: Sequence[str], special_tokens: bool, prompt_name: str | None, usage: Usage
    ) -> Sequence[Sequence[TextToken]]:
        """The tokens of each text, however long, after a prompt (the model's default one where none is named).

        With or without special tokens. They are counted in `usage`. Raises ServeAppError.
        """

    async def decode(
        self, model: str, sequences: Sequence[TokenIds], skip_special_tokens: bool, usage: Usage
    ) -> Sequence[str]:
        """The text of each sequence of token ids, which are counted in `usage`. Raises ServeAppError."""

    def has_version(self, name: str) -> bool:
        """Whether the model has a version that can answer. Raises ModelNotFoundError."""

    async def ready(self, name: str | None = None) -> None:
        """Return once that model, or every model, has answered a real forward pass; do not wait for one that cannot.

        Of all models, one that was added while the others served counts from its first version on.

        Raises UnavailableError with the reason, or ModelNotFoundError.
        """

    async def info(self, name: str) -> ModelInfo:
        """Raises ModelNotFoundError, or UnavailableError as `card` does."""

    def compute_type(self, name: str) -> str:
        """What the model runs on, "cpu" or "gpu", as far as is known; for the header `x-compute-type`."""

    async def metrics_text(self, everything: bool) -> bytes:
        """The cluster's metrics as Prometheus text exposition, format 0.0.4: Serve's and this application's, or all.

        Raises UnavailableError.
        """

    async def memory(self, name: str) -> str:
        """A replica's report of its memory, for a person. Raises ModelNotFoundError or UnavailableError."""

    async def cache(self) -> Sequence[ModelOnNode]:
        """Every model on every node. Raises UnavailableError."""

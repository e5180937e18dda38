"""`/v1/models`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from serve_app.ingress.encoding import encode
from serve_app.ingress.exchange import Exchange, Reply
from serve_app.ingress.protocols.openai.dialect import DIALECT
from serve_app.ingress.routes import Route
from serve_app.ingress.service import served_name


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[Model]


class Models:
    """`GET /v1/models` and one of them; a model's `created` is when this edge started to serve it."""

    def __init__(self) -> None:
        self._created = int(time.time())

    async def all(self, exchange: Exchange) -> Reply:
        """Below a model's own path that one alone."""
        in_path, service = exchange.path_model, exchange.service
        names = service.models if in_path is None else (served_name(in_path, service),)
        return Reply(encode({"object": "list", "data": [self._model(name) for name in names]}))

    async def one(self, exchange: Exchange) -> Reply:
        return Reply(encode(self._model(served_name(exchange.path_model or "", exchange.service))))

    def _model(self, name: str) -> Mapping[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "serve-app"}


def routes() -> tuple[Route, ...]:
    models = Models()
    return (
        Route("GET", "/v1/models", models.all, DIALECT, "List the models", answer=ModelList),
        Route(
            "GET", "/models/{name}/v1/models", models.all, DIALECT, "List the model", answer=ModelList, failures=(404,)
        ),
        Route("GET", "/v1/models/{name}", models.one, DIALECT, "Describe a model", answer=Model, failures=(404,)),
    )

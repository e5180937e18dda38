"""Which models there are: learned from Serve's controller while the ingress runs.

Each model is an application of its own beside the ingress's, so that a change of one restarts nothing of another. The
controller knows the configuration of every application; those that `serve_app.app:build_model` builds are models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from serve_app.config import (
    MODEL_BUILDER,
    ModelAppConfig,
    ModelConfig,
    aliases_of,
    model_deployment,
    parse,
    tokenizer_deployment,
)
from serve_app.errors import ConfigError
from serve_app.ingress.served_model import ModelTiers
from serve_app.ingress.tier import Tier, view_of

logger = logging.getLogger(__name__)


class Directory(Protocol):
    """Where an ingress learns which models it serves."""

    async def models(self) -> Mapping[str, ModelConfig]:
        """Application → its model, in the order of the configuration. Raises RayError while nobody knows."""

    def tiers(self, application: str, model: str) -> ModelTiers:
        """Handles to the deployments of a model, which need not be there yet."""


class ServeDirectory:
    """Asks the controller of the Serve instance that this replica belongs to."""

    def __init__(self) -> None:
        self._refused: dict[str, str] = {}
        self._tiers: dict[tuple[str, str], ModelTiers] = {}

    async def models(self) -> Mapping[str, ModelConfig]:
        """Models whose configuration is wrong are left out: their own applications tell why they cannot be built."""
        controller = _get_global_client()._controller
        configs: Mapping[str, Any] = await controller.get_app_configs.remote()
        found = {name: self._model(name, config.args) for name, config in configs.items() if _is_model(config)}
        return {name: model for name, model in found.items() if model is not None}

    def _model(self, application: str, args: Any) -> ModelConfig | None:
        try:
            return parse(ModelAppConfig, args, "args").model
        except ConfigError as error:
            if self._refused.get(application) != error.message:
                self._refused[application] = error.message
                logger.warning("application %s is no model that can be served: %s", application, error.message)
            return None

    def tiers(self, application: str, model: str) -> ModelTiers:
        """A model that comes back gets the handles that it had: Serve cannot end a handle's router."""
        if (application, model) not in self._tiers:
            names = (tokenizer_deployment(model), model_deployment(model))
            self._tiers[application, model] = ModelTiers(*(_tier(name, application) for name in names))
        return self._tiers[application, model]


def _is_model(config: Any) -> bool:
    return str(config.import_path).replace(".", ":") == MODEL_BUILDER.replace(".", ":")


def _tier(deployment: str, application: str) -> Tier:
    handle = serve.get_deployment_handle(deployment, application, _check_exists=False)  # it may be about to be made
    if not handle.is_initialized:  # so that its router learns of the replicas now, and not at the first call
        handle._init()
    return Tier(handle, view_of(DeploymentID(name=deployment, app_name=application)))


@dataclass(frozen=True, slots=True)
class Roll:
    """The models of one moment, by name, each with the application that it is of."""

    applications: Mapping[str, str]
    aliases: Mapping[str, str]


def roll_of(models: Mapping[str, ModelConfig]) -> Roll:
    """Names and aliases of the models by application; of two with the same, the first has it."""
    applications: dict[str, str] = {}
    kept: list[ModelConfig] = []
    for application, model in models.items():
        if model.name in applications:
            first = applications[model.name]
            logger.warning(
                "applications %s and %s both have a model %s; the first serves", first, application, model.name
            )
            continue
        applications[model.name] = application
        kept.append(model)
    return Roll(applications, aliases_of(kept))

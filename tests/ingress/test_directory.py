"""Which models an ingress serves: those that Serve's controller has applications for, each name once."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve_app.config import BUILDER, MODEL_BUILDER, IngressConfig, ModelConfig
from serve_app.errors import ModelNotFoundError
from serve_app.ingress import directory
from serve_app.ingress.deployment import Ingress
from serve_app.ingress.directory import Roll, ServeDirectory, roll_of
from serve_app.ingress.served_model import ModelTiers
from tests.ingress.test_coalescer import replica, settle
from tests.ingress.tiers import TINY, Tiers

__all__ = ["replica"]


def named(name: str, *aliases: str) -> ModelConfig:
    return TINY.model_copy(update={"name": name, "aliases": aliases})


def test_each_model_is_told_with_its_application_and_its_aliases() -> None:
    models = {"app-1": named("one", "first", "uno"), "app-2": named("two")}
    assert roll_of(models) == Roll({"one": "app-1", "two": "app-2"}, {"first": "one", "uno": "one"})


def test_of_two_models_with_one_name_the_first_serves_and_the_other_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = {"app-1": named("one", "first"), "app-2": named("one", "second"), "app-3": named("three")}
    assert roll_of(models) == Roll({"one": "app-1", "three": "app-3"}, {"first": "one"})
    assert "app-1 and app-2 both have a model one; the first serves" in caplog.text


def test_of_two_models_with_one_alias_the_first_has_it() -> None:
    models = {"app-1": named("one", "shared"), "app-2": named("two", "shared", "own")}
    assert roll_of(models).aliases == {"shared": "one", "own": "two"}


def test_an_alias_that_is_a_models_own_name_leads_to_that_model() -> None:
    assert roll_of({"app-1": named("one", "two"), "app-2": named("two")}).aliases == {}


class Controller:
    """Serve's, as far as it is asked: the configuration of every application."""

    def __init__(self, configs: Mapping[str, Any]) -> None:
        self.configs = configs
        self.get_app_configs = SimpleNamespace(remote=self._answer)

    async def _answer(self) -> Mapping[str, Any]:
        return self.configs


def application(args: Any, import_path: str = MODEL_BUILDER) -> Any:
    return SimpleNamespace(import_path=import_path, args=args)


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    controller = Controller({})
    monkeypatch.setattr(directory, "_get_global_client", lambda: SimpleNamespace(_controller=controller))
    return controller


TOLD = {"model": {"name": "tiny", "source": TINY.source}}


async def test_models_are_the_applications_that_are_built_as_such(controller: Controller) -> None:
    controller.configs = {
        "serve_app": application({}, BUILDER),
        "tiny": application(TOLD),
        "dotted": application({"model": {**TOLD["model"], "name": "other"}}, MODEL_BUILDER.replace(":", ".")),
        "somebody-else": application(TOLD, "other:app"),
    }
    assert await ServeDirectory().models() == {"tiny": TINY, "dotted": named("other")}


@pytest.mark.parametrize("args", [None, {}, {"model": {"name": "tiny"}}, {**TOLD, "more": 1}], ids=repr)
async def test_an_application_with_wrong_args_is_left_out_and_told_of_once(
    controller: Controller, caplog: pytest.LogCaptureFixture, args: Any
) -> None:
    controller.configs = {"wrong": application(args), "tiny": application(TOLD)}
    served = ServeDirectory()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await served.models() == {"tiny": TINY}
    (line,) = caplog.messages
    assert line.startswith("application wrong is no model that can be served: args")


async def test_an_application_that_is_mended_is_served(controller: Controller) -> None:
    served = ServeDirectory()
    controller.configs = {"tiny": application({})}
    assert await served.models() == {}
    controller.configs = {"tiny": application(TOLD)}
    assert await served.models() == {"tiny": TINY}


class Changing:
    """A directory whose models a test changes."""

    def __init__(self) -> None:
        self.now: dict[str, ModelConfig] = {}
        self.handles: dict[str, Tiers] = defaultdict(Tiers)
        """By the model's name."""
        self.made: list[tuple[str, str]] = []
        self.failure: Exception | None = None

    async def models(self) -> Mapping[str, ModelConfig]:
        if self.failure is not None:
            raise self.failure
        return dict(self.now)

    def tiers(self, application: str, model: str) -> ModelTiers:
        self.made.append((application, model))
        tier = self.handles[model].tier
        return ModelTiers(tier, tier)


async def test_an_ingress_serves_what_its_directory_tells_and_keeps_what_stays() -> None:
    changing = Changing()
    ingress = Ingress(IngressConfig(), changing)
    await ingress.look()
    assert ingress.models == ()
    changing.now = {"app-1": named("one", "first")}
    await ingress.look()
    first = ingress._served["one"]
    changing.now = {"app-1": named("one", "first"), "app-2": named("two")}
    await ingress.look()
    assert (ingress.models, ingress.aliases) == (("one", "two"), {"first": "one"})
    assert ingress._served["one"] is first
    changing.now = {"app-3": named("two"), "app-1": named("one")}
    await ingress.look()
    assert ingress._served["one"] is first, "aliases are no reason to begin anew"
    assert changing.made == [("app-1", "one"), ("app-2", "two"), ("app-3", "two")], "which moved"
    changing.now = {"app-3": named("two")}
    await ingress.look()
    assert (ingress.models, ingress.aliases) == (("two",), {})
    changing.failure = RayActorError()
    with pytest.raises(RayActorError):
        await ingress.look()
    assert ingress.models == ("two",), "who knows nobody's models goes on with those it knew"


async def test_who_waits_for_a_model_that_is_removed_is_told_so() -> None:
    changing = Changing()
    changing.now = {"app-1": named("one"), "app-2": named("two")}
    changing.handles["one"].tier.view.update({})  # it has no replica yet
    ingress = Ingress(IngressConfig(), changing)
    await ingress.look()
    waits = asyncio.create_task(ingress.card("one"))
    await settle()
    assert not waits.done()
    del changing.now["app-1"]
    await ingress.look()
    with pytest.raises(ModelNotFoundError):
        await asyncio.wait_for(waits, 5)

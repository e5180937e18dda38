"""The example of all tasks: its models are made, and its file is right about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from deploy.examples.make_tiny_models import MODELS, make
from serve_app.cli.check import check_file
from serve_app.config import ModelConfig, TaskName
from serve_app.tasks.card import read_card
from tests.live import EXAMPLES, models_of

CONFIG: dict[str, Any] = yaml.safe_load(EXAMPLES.read_text())
SERVED = models_of(CONFIG)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make(folder)
    return folder


def test_the_file_has_no_errors() -> None:
    assert [str(finding) for finding in check_file(EXAMPLES, cores=2) if finding.is_error] == []


def test_there_is_a_model_of_every_task() -> None:
    assert {model["task"] for model in SERVED} == set(get_args(TaskName))
    assert {model["name"] for model in SERVED} == {"embedding", *MODELS}


def test_every_deployment_is_in_the_file_and_all_fit_on_two_cores() -> None:
    entries = {one["name"]: one["deployments"] for one in CONFIG["applications"]}
    wanted = {model["name"]: {f"{model['name']}-{tier}" for tier in ("tokenizer", "model")} for model in SERVED}
    assert {name: {entry["name"] for entry in some} for name, some in entries.items()} == {
        "serve_app": {"ingress"},
        **wanted,
    }
    cpus = {name: sum(entry["ray_actor_options"]["num_cpus"] for entry in some) for name, some in entries.items()}
    assert sum(cpus.values()) + max(cpus.values()) <= 2, "one application may surge"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_the_file_says(made: Path, name: str) -> None:
    (config,) = [model for model in SERVED if model["name"] == name]
    card = read_card(made / name, ModelConfig.model_validate(config), "0" * 40)
    assert card.task == config["task"]
    assert card.max_input_tokens == 512
    assert (made / name / "tokenizer.json").is_file()


def test_the_models_are_the_same_each_time(made: Path, tmp_path: Path) -> None:
    make(tmp_path, names=("rerank",))
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "rerank" / file).read_bytes() == (made / "rerank" / file).read_bytes()

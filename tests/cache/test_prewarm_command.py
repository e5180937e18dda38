from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from serve_app.cache.status import ModelOnNode
from serve_app.cache.store import READY
from serve_app.cli.main import main
from serve_app.cli.prewarm import Board
from serve_app.config import BUILDER, MODEL_BUILDER, CacheConfig, ModelConfig
from tests.hub.server import Fault, LocalHub

CANARY = "hf_canary0123456789"


@pytest.fixture
def config(tiny_model: ModelConfig, tiny_bert: Path, cache: CacheConfig, tmp_path: Path) -> Path:
    """Serves tiny-org/tiny-bert from the hub as `tiny`, and the same files from their directory as `local`."""
    hub_model = {"name": "tiny", "source": tiny_model.source, "revision": tiny_model.revision}
    models = [hub_model, {"name": "local", "source": str(tiny_bert)}]
    ingress = {"name": "app", "import_path": BUILDER, "args": {"cache": {"root": cache.root}}}
    applications = [ingress, *(_application(model, cache) for model in models)]
    path = tmp_path / "serve_config.yaml"
    path.write_text(json.dumps({"applications": applications}))
    return path


def _application(model: dict[str, Any], cache: CacheConfig) -> dict[str, Any]:
    args = {"model": model, "cache": {"root": cache.root}}
    return {"name": model["name"], "route_prefix": None, "import_path": MODEL_BUILDER, "args": args}


def ready(cache: CacheConfig) -> set[str]:
    return {marker.parent.parent.name for marker in Path(cache.root).rglob(READY)}


def test_this_machine_is_warmed_with_all_models(
    config: Path, cache: CacheConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prewarm", str(config), "--node"]) == 0
    assert ready(cache) == {"tiny", "local"}
    assert len([line for line in capsys.readouterr().out.splitlines() if ": ready" in line]) == 2


def test_only_the_named_model_is_warmed(config: Path, cache: CacheConfig) -> None:
    assert main(["prewarm", str(config), "--node", "--model", "local"]) == 0
    assert ready(cache) == {"local"}


def test_a_model_that_is_not_in_the_file_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prewarm", str(config), "--node", "--model", "other"]) == 1
    assert "there is no model other" in capsys.readouterr().err


def test_one_models_error_is_told_and_leaves_the_others_alone(
    config: Path, hub: LocalHub, cache: CacheConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.fail(Fault("/tree/", status=403))
    assert main(["prewarm", str(config), "--node", "--json"]) == 1
    output = capsys.readouterr()
    states = {state["model"]: state for state in json.loads(output.out)}
    assert states["tiny"]["phase"] == "error"
    assert "may not read it" in states["tiny"]["error"]
    assert states["local"]["phase"] == "ready"
    assert CANARY not in output.out + output.err


def test_where_there_is_no_cluster_that_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prewarm", str(config), "--address", "127.0.0.1:9"]) == 1
    assert "no Ray cluster at '127.0.0.1:9'" in capsys.readouterr().err


def test_what_is_wrong_with_the_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prewarm", str(tmp_path / "none.yaml"), "--node"]) == 1
    assert "No such file" in capsys.readouterr().err


def test_without_a_terminal_each_change_of_phase_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Board(has_bars=False) as board:
        for phase, done in (("downloading", 1), ("downloading", 2), ("ready", 4)):
            board.show([ModelOnNode("n", "10.0.0.1", "m", "r", phase, done, 4)])  # type: ignore[arg-type]
    assert capsys.readouterr().err == "m on 10.0.0.1: downloading\nm on 10.0.0.1: ready\n"


def test_on_a_terminal_each_node_has_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Board(has_bars=True) as board:
        for done in (0, 50):
            board.show([ModelOnNode("n", f"10.0.0.{i}", "m", "r", "downloading", done, 100) for i in (1, 2)])
    bars = capsys.readouterr().err
    for address in ("10.0.0.1", "10.0.0.2"):
        assert re.search(rf"m on {address}:  50%.*50\.0/100 .*B/s, downloading", bars)

"""`serve-app deploy` against a dashboard that is made up: what it says, and what it puts back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import deploy
from serve_app.cli.main import main
from tests.live import ROOT

FILE = ROOT / "serve_config.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
NAMES = [application["name"] for application in CONFIG["applications"]]
MODEL = NAMES[1]
TRACEBACK = """ray::ServeReplica.initialize() (pid=1)
  File "replica.py", line 3, in initialize
serve_app.errors.IncompleteModelError: the weights in abc are damaged: no header"""


def application(status: str, message: str = "", **more: Any) -> dict[str, Any]:
    tier = {"status": "HEALTHY" if status == "RUNNING" else status, "message": message, "target_num_replicas": 1}
    deployments = {"tier": {**tier, "replicas": [], **more}}
    return {"status": status, "message": message, "deployments": deployments, "deployed_app_config": {"old": 1}}


def all_of(status: str, **of_model: Any) -> dict[str, Any]:
    return {NAMES[0]: application("RUNNING"), MODEL: application(status, **of_model)}


class Dashboard:
    """Tells the next of `answers` whenever it is asked, the last one for ever."""

    def __init__(self, answers: Sequence[Mapping[str, Any]], port: int = 8000) -> None:
        self.address = "http://127.0.0.1:8265"
        self.deployed: list[Any] = []
        self._answers, self._port = list(answers), port

    def details(self) -> dict[str, Any]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return {"applications": answer, "http_options": {"port": self._port}}

    def deploy(self, config: Any) -> None:
        self.deployed.append(config)


@pytest.fixture
def against(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*answers: Mapping[str, Any], port: int = 8000, options: Sequence[str] = ()) -> tuple[int, Dashboard]:
        dashboard = Dashboard(answers, port)
        monkeypatch.setattr(deploy, "Dashboard", lambda address: dashboard)
        monkeypatch.setattr(deploy, "POLL_S", 0.0)
        return main(["deploy", str(FILE), *options]), dashboard

    return run


def test_it_waits_until_all_of_it_runs(against: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, dashboard = against({}, all_of("DEPLOYING"), all_of("RUNNING"))
    assert code == 0
    assert dashboard.deployed == [CONFIG]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{MODEL}: DEPLOYING, tier DEPLOYING (0 of 1 run)",
        f"{MODEL}: RUNNING",
    ]


def test_what_fails_is_told_in_short_and_what_ran_before_is_put_back(
    against: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, dashboard = against(all_of("RUNNING"), all_of("DEPLOY_FAILED", message=TRACEBACK))
    assert code == 1
    told = capsys.readouterr().err
    assert f"{MODEL} cannot be deployed:\nthe weights in abc are damaged: no header\n" in told
    assert "ray::ServeReplica" not in told
    assert dashboard.deployed[1] == {**CONFIG, "applications": [CONFIG["applications"][0], {"old": 1}]}


@pytest.mark.parametrize(
    ("before", "options"),
    [({}, ()), (all_of("DEPLOY_FAILED"), ()), (all_of("RUNNING"), ("--keep-failed",))],
    ids=["new", "failed before", "kept as asked"],
)
def test_nothing_is_put_back_that_did_not_run_or_is_not_wanted(
    against: Any, before: Mapping[str, Any], options: Sequence[str]
) -> None:
    code, dashboard = against(before, all_of("DEPLOY_FAILED", message="no"), options=options)
    assert code == 1
    assert dashboard.deployed == [CONFIG]


def test_a_roll_out_that_takes_too_long_goes_on(against: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, dashboard = against(all_of("RUNNING"), all_of("DEPLOYING"), options=("--timeout", "0"))
    assert code == 1
    assert "goes on without this command" in capsys.readouterr().err
    assert dashboard.deployed == [CONFIG]


def test_the_dashboard_of_another_server_is_refused(against: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, dashboard = against(all_of("RUNNING"), port=8123)
    assert code == 1
    assert "answers HTTP on port 8123, and the file says 8000" in capsys.readouterr().err
    assert dashboard.deployed == []


def test_a_file_with_an_error_is_not_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve_config.yaml"
    file.write_text(FILE.read_text("utf-8").replace("task: embedding", "task: embeding"))
    monkeypatch.setattr(deploy, "Dashboard", lambda address: pytest.fail("the dashboard is asked"))
    assert main(["deploy", str(file)]) == 1


def test_a_replica_without_a_node_is_told_after_a_while() -> None:
    waiting = {"replicas": [{"state": "STARTING", "node_id": None}, {"state": "RUNNING", "node_id": "n"}]}
    details = application("DEPLOYING", **waiting, deployment_config={"ray_actor_options": {"num_gpus": 1.0}})
    assert "no node" not in deploy.told_of("m", details, 1.0)
    assert "no node has had room yet (num_gpus 1)" in deploy.told_of("m", details, 60.0)

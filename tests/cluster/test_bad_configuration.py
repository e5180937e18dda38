"""A configuration that is wrong ends with the key and the reason, and nothing left running."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.live import ROOT, local_config, models_of, served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def misspelled_task(config: dict[str, Any]) -> None:
    models_of(config)[0]["task"] = "embeding"


def unpinned_revision(config: dict[str, Any]) -> None:
    models_of(config)[0] |= {"source": "sentence-transformers/all-MiniLM-L6-v2", "revision": "main"}


def budget_too_small(config: dict[str, Any]) -> None:
    config["applications"][1]["deployments"][1]["user_config"]["max_batch_tokens"] = 100


def models_in_one_application(config: dict[str, Any]) -> None:
    config["applications"][0]["args"]["models"] = models_of(config)


CASES = {
    misspelled_task: "args.model.task: Input should be 'embedding'",
    unpinned_revision: "args.model.revision: 'main' is not a full 40-hex commit",
    budget_too_small: "applications[1].deployments[1].user_config.max_batch_tokens: 100 is below the model's longest",
    models_in_one_application: "Models are applications of their own",
}


def name_of(change) -> str:
    return change.__name__


@pytest.mark.parametrize("change", CASES, ids=name_of)
def test_serve_app_serve_ends_at_once_with_the_key_and_the_reason(change, tmp_path: Path):
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(local_config(tmp_path, change)))
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "serve", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert CASES[change] in done.stderr


@pytest.mark.parametrize("change", [misspelled_task, models_in_one_application], ids=name_of)
def test_plain_serve_run_prints_the_key_and_the_reason(change):
    with served(change, wait=False) as running:
        deadline = time.monotonic() + 200  # a busy machine takes its time to start Ray
        while CASES[change] not in running.log and time.monotonic() < deadline:
            time.sleep(0.5)
        assert CASES[change] in running.log

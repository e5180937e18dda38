"""What the bench sends is what its ceiling computes, for every task."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import orjson
import pytest

from serve_app.cli.bench.ceiling import CeilingPlan, InProcess
from serve_app.cli.bench.loads import LOADS
from serve_app.cli.bench.measure import Sample, verify_counts
from serve_app.cli.bench.wire import Target
from serve_app.tasks.registry import TASKS

EXAMPLES = Path(__file__).parents[3] / "deploy" / "examples" / "make_tiny_models.py"
FOLDERS = {
    "sparse-embedding": "sparse-embedding",
    "text-classification": "text-classification",
    "zero-shot-classification": "zero-shot",
    "token-classification": "token-classification",
    "fill-mask": "fill-mask",
    "question-answering": "question-answering",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_tiny_models", EXAMPLES)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("models")
    script.make(folder, tuple(FOLDERS.values()))
    return folder


def test_every_task_that_is_answered_at_once_has_a_load_with_a_ceiling() -> None:
    assert {task for task, load in LOADS.items() if load.options is not None} == set(TASKS) - {
        "embedding",
        "similarity",
    }


@pytest.mark.parametrize("task", FOLDERS)
def test_the_ceiling_computes_all_texts(task: str, models: Path) -> None:
    engine = InProcess(CeilingPlan(str(models / FOLDERS[task]), 64, 8, 0, 1, 1, (256,), task), 0)

    computed = engine.compute(256)

    assert computed.took["texts"] == 8
    assert computed.took["attention"] == "packed"
    assert computed.answers is not None


@pytest.mark.parametrize("task", LOADS)
def test_each_task_has_one_body_for_a_path_of_its_model(task: str) -> None:
    target = Target("host", 1, model="m", task=task, mask="[MASK]")

    assert target.route.startswith("/models/m")
    body = orjson.dumps(target.body(["one text", "another"]))
    assert b"one text" in body
    assert b"another" in body
    assert (b"[MASK]" in body) == (task == "fill-mask")


def test_answers_are_counted() -> None:
    right, few, other = (Sample(0, 2, body) for body in (b"[[1],[2]]", b"[[1]]", b"{}"))

    assert verify_counts([right, right], per_text=True).wrong == 0
    assert verify_counts([right, few, other], per_text=True).wrong == 2
    assert verify_counts([few], per_text=False).wrong == 0

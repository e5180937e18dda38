from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.cli.options_reference import TASKS, page, reference, routes_of
from serve_app.ingress.protocols import openai, tei
from serve_app.ingress.protocols.fields import InferenceBody
from serve_app.ingress.protocols.generation import GenerateFields
from serve_app.ingress.protocols.open_inference.tasks import TASK_TENSORS
from serve_app.ingress.protocols.task_options import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text("utf-8")
    assert text == page(text), "run: python -m serve_app.cli.options_reference docs/tasks.md"


def test_every_option_is_explained() -> None:
    unexplained = [line for line in reference().splitlines() if line.endswith("|  |")]
    assert not unexplained


@pytest.mark.parametrize("task", OPTIONS)
def test_every_route_that_answers_a_task_has_all_of_its_options(task: str) -> None:
    routes = routes_of(task)
    assert routes
    for route in routes:
        assert OPTIONS[task].model_fields.keys() <= route.fields, route.path


def test_every_route_that_computes_is_on_the_page() -> None:
    bodies = {
        route.path: route.body
        for route in (*tei.routes(), *openai.routes())
        if "{" not in route.path and isinstance(route.body, type) and issubclass(route.body, InferenceBody)
    }
    assert bodies.keys() == TASKS.keys()
    assert OPTIONS.keys() == TASK_TENSORS.keys()


def test_what_generate_can_do_is_the_same_for_all_that_generate() -> None:
    for task in ("text-generation", "text2text-generation", "summarization", "translation"):
        assert GenerateFields.model_fields.keys() <= OPTIONS[task].model_fields.keys()


@pytest.mark.parametrize("task", OPTIONS)
def test_null_is_a_value_of_every_option_that_says_nothing(task: str) -> None:
    fields = OPTIONS[task].model_fields
    nothing = {name: None for name, field in fields.items() if name not in ("over_windows",)}
    assert OPTIONS[task].model_validate(nothing)

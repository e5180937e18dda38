"""Writes the options of every task into docs/tasks.md: `python -m serve_app.cli.options_reference docs/tasks.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from serve_app.ingress.protocols import openai, tei
from serve_app.ingress.protocols.fields import InferenceBody, LongTextFields
from serve_app.ingress.protocols.huggingface.endpoint import BODIES
from serve_app.ingress.protocols.huggingface.ranking import RankingBody
from serve_app.ingress.protocols.open_inference.tasks import TASK_TENSORS
from serve_app.ingress.protocols.task_options import OPTIONS
from serve_app.ingress.protocols.unknown import HARMLESS, NEUTRAL

START, END = "<!-- options: made from the code -->", "<!-- options: end -->"

TASKS: Mapping[str, str] = {
    "/embed": "embedding",
    "/embeddings": "embedding",
    "/v1/embeddings": "embedding",
    "/similarity": "similarity",
    "/embed_all": "token-embedding",
    "/embed_sparse": "sparse-embedding",
    "/predict": "text-classification",
    "/rerank": "rerank",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/v1/completions": "text-generation",
    "/v1/chat/completions": "text-generation",
}
"""The task of each path that has one."""

_AT_THE_ROOT: Mapping[str, type[BaseModel]] = {
    **BODIES,
    "similarity": BODIES["embedding"],
    "rerank": RankingBody,
    "zero-shot-classification": BODIES["zero-shot-classification"],
}

_HEAD = """\
## The options of each task

This part is made from the code: `python -m serve_app.cli.options_reference docs/tasks.md`. An option has one name
and one meaning on every route that answers its task, the Open Inference Protocol (in `parameters`) included. Its
default is the same but for `normalize`, which is true at `/embed` and `/v1/embeddings` as with TEI and OpenAI. What a
route does not have is refused by its name (422, OpenAI's routes 400) unless it changes nothing. At the root, options of
embeddings stand beside `inputs` or in `parameters`; those of other tasks in `parameters`.
"""


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """A route, and all the fields that its bodies have."""

    path: str
    fields: frozenset[str]


def routes_of(task: str) -> list[RouteOptions]:
    """Every route that answers the task but the Open Inference Protocol's, which has the task's options as they are."""
    found = [
        RouteOptions(route.path, _fields(route.body))
        for route in (*tei.routes(), *openai.routes())
        if isinstance(route.body, type) and TASKS.get(route.path) == task
    ]
    if task in _AT_THE_ROOT:
        found.append(RouteOptions("/", _fields(_AT_THE_ROOT[task])))
    return found


def _fields(body: type[BaseModel]) -> frozenset[str]:
    """Those beside the inputs, and those in `parameters`."""
    names = set(body.model_fields)
    for field in body.model_fields.values():
        for kind in getattr(field.annotation, "__args__", ()):
            if isinstance(kind, type) and issubclass(kind, LongTextFields):
                names |= kind.model_fields.keys()
    return frozenset(names)


def reference() -> str:
    """The part of the page between its marks."""
    groups: dict[type[LongTextFields], list[str]] = {}
    for task, fields in OPTIONS.items():
        groups.setdefault(fields, []).append(task)
    parts = [_HEAD, "### Every task\n", "| option | |\n|---|---|", _rows(_told(LongTextFields))]
    for fields, tasks in groups.items():
        parts += _section(fields, tasks)
    parts += _neutral()
    return "\n".join(parts)


def _section(fields: type[LongTextFields], tasks: list[str]) -> Iterator[str]:
    assert all(task in TASK_TENSORS for task in tasks)
    yield f"### {', '.join(tasks)}\n"
    for task in tasks:
        yield f"- {task}: {', '.join(f'`{route.path}`' for route in routes_of(task))}"
    yield "\n| option | |\n|---|---|"
    common = _told(LongTextFields)
    yield _rows({name: told for name, told in _told(fields).items() if common.get(name) != told})
    more = {route.path: _only_there(route, fields) for task in tasks for route in routes_of(task)}
    for path, names in more.items():
        if names:
            yield f"`{path}` also has {', '.join(f'`{name}`' for name in names)}.\n"


def _told(fields: type[LongTextFields]) -> dict[str, str]:
    """What is said of each option, by its name."""
    schema = fields.model_json_schema()["properties"]
    return {name: _cell(schema[name].get("description", "")) for name in fields.model_fields}


def _rows(told: Mapping[str, str]) -> str:
    return "".join(f"| `{name}` | {text} |\n" for name, text in told.items())


_NOT_OPTIONS = frozenset(InferenceBody.model_fields) | {
    *("inputs", "input", "query", "texts", "documents", "prompt", "messages", "parameters"),
}


def _only_there(route: RouteOptions, fields: type[LongTextFields]) -> list[str]:
    """Other names for the same options, and what is about the answer's form. One body may serve several tasks."""
    others = {name for each in OPTIONS.values() for name in each.model_fields}
    inputs = _NOT_OPTIONS - ({"documents"} if route.path == "/v1/chat/completions" else set())
    return sorted(route.fields - fields.model_fields.keys() - inputs - others)


def _neutral() -> Iterator[str]:
    yield "### What changes nothing\n"
    yield "Null is accepted for every name, and for these what they are without being asked for:\n"
    yield "| name | values |\n|---|---|"
    for name, values in sorted(NEUTRAL.items()):
        yield f"| `{name}` | {', '.join(f'`{json.dumps(value)}`' for value in values)} |"
    yield f"\nAny value, because it changes no answer: {', '.join(f'`{name}`' for name in sorted(HARMLESS))}.\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def page(text: str) -> str:
    """The page with its part made anew. Raises ValueError if the marks are not there."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{reference()}{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text("utf-8")), "utf-8")

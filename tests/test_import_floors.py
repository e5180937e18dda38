"""The house has floors, imports go down only, and two rooms on one floor never import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import serve_app

PACKAGE = Path(serve_app.__file__).parent

FLOORS: list[set[str]] = [
    {"errors", "logs", "timeouts"},
    {"options", "outputs", "paths"},
    {"types", "config", "metrics"},
    {"versions"},
    {"tasks", "cache"},
    {"tokenizer", "model", "autoscaling"},
    {"ingress"},
    {"app", "cli"},
]
"""From the ground up; `errors` is below the rest of the ground floor, which raises them."""

RAY_FREE = {
    "errors",
    "logs",
    "options",
    "outputs",
    "paths",
    "timeouts",
    "types",
    "config",
    "versions",
    "tasks",
    "model",
}


class Import(NamedTuple):
    module: str
    """Dotted name of what is imported: a module, or a name in one."""
    line: int


def rooms() -> set[str]:
    return {entry.stem for entry in PACKAGE.iterdir() if is_room(entry)}


def is_room(entry: Path) -> bool:
    if entry.name.startswith("__"):
        return False
    return entry.suffix == ".py" or (entry.is_dir() and any(entry.rglob("*.py")))


def files_of(room: str) -> list[Path]:
    return [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))


def imports(source: str) -> Iterator[Import]:
    """Every import in the source, wherever it stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it absolute"
            yield from (Import(f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def trespasses(room: str, source: str) -> list[str]:
    """Imports in a source of `room` that do not go down."""
    return [
        f"line {found.line}: {room} imports {found.module}"
        for found in imports(source)
        if found.module.startswith("serve_app.")
        and (other := found.module.split(".")[1]) in rooms() - {room}
        and floor_of(other) >= floor_of(room)
    ]


def test_building_an_application_loads_no_torch() -> None:
    """Serve builds each application in a process of its own, all at once."""
    code = "import serve_app.app, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_room_has_a_floor() -> None:
    assert rooms() <= set.union(*FLOORS)


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_go_down_only(room: str) -> None:
    wrong = [f"{path.name} {line}" for path in files_of(room) for line in trespasses(room, path.read_text("utf-8"))]
    assert not wrong


@pytest.mark.parametrize("room", sorted(RAY_FREE & rooms()))
def test_this_room_runs_without_ray(room: str) -> None:
    wrong = [
        f"{path.name} line {found.line}"
        for path in files_of(room)
        for found in imports(path.read_text("utf-8"))
        if found.module.split(".")[0] == "ray"
    ]
    assert not wrong


def test_no_module_of_a_room_is_part_of_a_cycle() -> None:
    graph = {name: set(internal_imports(path, graph_names())) for name, path in graph_names().items()}
    cycle = find_cycle(graph)
    assert not cycle, " → ".join(cycle)


def graph_names() -> dict[str, Path]:
    return {dotted(path): path for room in rooms() for path in files_of(room)}


def dotted(path: Path) -> str:
    parts = ("serve_app", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def internal_imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for found in imports(path.read_text("utf-8")):
        module = found.module if found.module in known else found.module.rpartition(".")[0]
        if module in known and module != dotted(path):
            yield module


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph[node]):
            if cycle := visit(following, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("tasks", "from serve_app.model.runner import Runner"),
        ("model", "from serve_app.tokenizer.encoder import Encoder"),
        ("model", "from serve_app import ingress"),
        ("config", "def f():\n    import serve_app.types"),
        ("ingress", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from serve_app.app import build"),
    ],
)
def test_an_import_up_or_across_is_found(room: str, source: str) -> None:
    assert trespasses(room, source)


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]

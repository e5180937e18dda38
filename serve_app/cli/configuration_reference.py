"""Writes docs/configuration.md from the configuration itself: `python -m serve_app.cli.configuration_reference`."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from serve_app.config import IngressConfig, IngressSettings, ModelAppConfig, ModelSettings

HEAD = """\
# Configuration

Every key of `args` and `user_config` in `serve_config.yaml`, with its default. This page is made from
`serve_app/config.py`: `python -m serve_app.cli.configuration_reference > docs/configuration.md`.

Keys under `args` say what a deployment *is*: changing one replaces the application's replicas. Keys under `user_config`
are what an operator tunes: a changed number applies to running replicas on the next deploy. Unknown keys are refused.
`serve-app check serve_config.yaml` checks a file without starting anything. The other keys of the file are Ray Serve's
own; `serve_config.yaml` lists those worth tuning, each with its unit.
"""

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("args of the ingress application", IngressConfig),
    ("args of a model's application", ModelAppConfig),
    ("user_config of the deployment `ingress`", IngressSettings),
    ("user_config of each deployment `<model>-model`", ModelSettings),
)


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for where, model in SECTIONS:
        parts += _section(where, model)
    return "\n".join(parts)


def _section(where: str, model: type[BaseModel]) -> Iterator[str]:
    """A table for the model, and one for each model inside it."""
    title = where if " " in where else f"`{where}`"
    yield f"## {title}\n"
    if "user_config" not in where:
        yield f"{_first_line(model)}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    yield "".join(f"{_row(name, field)}\n" for name, field in model.model_fields.items())
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            brackets = "[]" if _is_list(field.annotation) else ""
            yield from _section(f"{where}, `{name}{brackets}`", inner)


def _row(name: str, field: FieldInfo) -> str:
    description = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {_type(field)} | {_default(field)} | {description} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value)}`"


def _type(field: FieldInfo) -> str:
    """In words of YAML."""
    return _words(field.annotation) + _bounds(field.metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    """The least and the greatest value, some of which types like PositiveInt carry."""
    return "".join(_bound(constraint) for constraint in metadata)


def _bound(constraint: Any) -> str:
    match constraint:
        case FieldInfo():
            return _bounds(constraint.metadata)
        case Gt(gt=bound):
            return f" above {bound}"
        case Ge(ge=bound):
            return f" from {bound}"
        case Lt(lt=bound):
            return f" below {bound}"
        case Le(le=bound):
            return f" to {bound}"
    return ""


def _words(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _words(inner[0]) + _bounds(inner[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (tuple, list):
        return f"list of {_words(inner[0])}s"
    if origin is not None and issubclass(_class_of(origin), typing.Mapping):
        return f"mapping of {_words(inner[0])} to {_words(inner[1])}"
    if inner:
        return " or ".join(_words(part) for part in inner if part is not type(None))
    return {"str": "string", "int": "integer", "float": "number", "bool": "true, false"}[annotation.__name__]


def _class_of(origin: Any) -> type:
    return origin if isinstance(origin, type) else object


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (tuple, list)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    print(reference(), end="")

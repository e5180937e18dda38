"""A model's JSON files. A file that is there and cannot be read says so, whoever reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from serve_app.errors import IncompleteModelError

Json: TypeAlias = Mapping[str, Any]


def read_object(file: Path, required: bool = False) -> Json:
    """The object in `file`; an empty one where there is no such file, unless it is `required`.

    Raises IncompleteModelError where it is missing and required, or is no JSON object.
    """
    if not file.exists():
        if required:
            raise IncompleteModelError(f"{file.parent.name}/{file.name} is missing from the model's files")
        return {}
    return cast(Json, _parse(file, dict))


def read_list(file: Path) -> list[Any]:
    """The list in `file`; an empty one where there is no such file. Raises IncompleteModelError if it is no list."""
    return cast("list[Any]", _parse(file, list)) if file.exists() else []


def _parse(file: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IncompleteModelError(f"{file.parent.name}/{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise IncompleteModelError(f"{file.parent.name}/{file.name} is not a JSON {kind.__name__}")
    return value

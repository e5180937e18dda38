from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from serve_app import config
from serve_app.cli.configuration_reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == reference(), (
        "run: python -m serve_app.cli.configuration_reference > docs/configuration.md"
    )


def test_every_key_of_every_class_is_on_the_page() -> None:
    page = reference()
    classes = [
        value
        for name, value in vars(config).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == config.__name__
    ]

    missing = [f"{cls.__name__}.{key}" for cls in classes for key in cls.model_fields if f"| `{key}` |" not in page]
    assert not missing


def test_types_defaults_and_bounds_are_told() -> None:
    rows = {line.split("|")[1].strip(): line for line in reference().splitlines() if line.startswith("| `")}

    assert '| `auto`, `cpu`, `cuda` | `"auto"` |' in rows["`device`"]
    assert "| integer above 0 | `1` |" in rows["`num_threads`"]
    assert "| integer above 0 | none |" in rows["`max_input_tokens`"]
    assert "| string | *required* |" in rows["`name`"]
    assert "| number above 0 | `60.0` |" in rows["`request_timeout_s`"]
    assert "| mapping of string to string | none |" in rows["`prompts`"]
    assert "| mapping | *required* |" in rows["`model`"]
    assert "| list of strings | `[]` |" in rows["`aliases`"]

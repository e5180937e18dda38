"""No code that comes with a model is ever run."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import serve_app
from serve_app.errors import ServeAppError
from serve_app.model.generation.loader import load_decoder
from serve_app.tasks.stock_tokenizer import read_stock_tokenizer
from serve_app.tokenizer.chat import ChatTemplate

PACKAGE = Path(serve_app.__file__).parent
LOADS = ("from_pretrained", "from_config")


def loads() -> Iterator[tuple[str, ast.Call, ast.Module]]:
    """Every call by which transformers makes something of a model's files."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADS:
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node, tree


def test_every_load_refuses_code_of_the_model() -> None:
    found = list(loads())
    assert len(found) >= 6, "the calls are written in another way: this test must learn it"
    assert [where for where, call, tree in found if not refuses_code(call, tree)] == []


def refuses_code(call: ast.Call, tree: ast.Module) -> bool:
    """Whether `trust_remote_code=False` is among its arguments, or in a dictionary of the module that is."""
    spread = [keyword.value.id for keyword in call.keywords if isinstance(keyword.value, ast.Name) and not keyword.arg]
    keywords = [(keyword.arg, keyword.value) for keyword in call.keywords]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and names_of(node) & set(spread):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            keywords += [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
    given = [value.value for name, value in keywords if name == "trust_remote_code" and isinstance(value, ast.Constant)]
    return given == [False]


def names_of(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose tokenizer is a class of its own."""
    settings = {
        "tokenizer_class": "Homemade",
        "auto_map": {"AutoTokenizer": ["homemade.Homemade", "homemade.Homemade"]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "homemade"}))
    code = "from transformers import BertTokenizerFast as Homemade"
    (tmp_path / "homemade.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code}\n")
    return tmp_path


@pytest.mark.parametrize(
    "read",
    [read_stock_tokenizer, load_decoder, lambda folder: ChatTemplate(folder).load()],
    ids=["tokenize", "decode", "chat"],
)
def test_code_of_a_tokenizer_is_not_run_whatever_somebody_answers_to_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    """Transformers asks on the terminal, if it is not told."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with contextlib.suppress(ServeAppError, ValueError):
        read(folder)
    assert not (folder / "ran").exists()

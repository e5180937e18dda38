from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import types

import pytest

from serve_app.cli import main as cli
from serve_app.errors import ConfigError
from tests.live import ROOT


@pytest.fixture
def greet(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `greet` in a module of its own."""
    module = types.ModuleType("greeting")
    module.add_arguments = lambda parser: parser.add_argument("--loud", action="store_true")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "greeting", module)
    monkeypatch.setitem(cli.COMMANDS, "greet", ("greeting", "say hello"))
    return module


def test_a_command_gets_its_own_arguments(greet: types.ModuleType) -> None:
    seen: list[argparse.Namespace] = []
    greet.run = seen.append  # type: ignore[attr-defined]

    assert cli.main(["greet", "--loud"]) == 0
    assert seen[0].loud


def test_a_command_says_how_it_went(greet: types.ModuleType) -> None:
    greet.run = lambda args: 3  # type: ignore[attr-defined]

    assert cli.main(["greet"]) == 3


def test_an_error_of_ours_is_a_message_and_not_a_traceback(
    greet: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ConfigError("args.models: name at least one")

    greet.run = fail  # type: ignore[attr-defined]

    assert cli.main(["greet"]) == 1
    assert capsys.readouterr().err == "serve-app: args.models: name at least one\n"


def test_ctrl_c_is_quiet(greet: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    greet.run = interrupt  # type: ignore[attr-defined]

    assert cli.main(["greet"]) == 130
    assert capsys.readouterr().err == ""


def test_help_loads_no_command(greet: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    del sys.modules["greeting"]  # importing it now would fail

    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])

    assert end.value.code == 0
    assert "say hello" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["greet", "--no-such-option"]])
def test_a_wrong_call_is_refused(greet: types.ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)

    assert end.value.code == 2


def documented() -> list[str]:
    """What stands after `serve-app` in every document: in a line for a shell, or quoted in a sentence."""
    found: set[str] = set()
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "serve_config.yaml"]:
        text = file.read_text("utf-8")
        blocks = re.findall(r"```sh\n.*?```|(?:^ {4}[^\n]*\n)+", text, re.MULTILINE | re.DOTALL)
        found |= set(re.findall(r"^ *serve-app ([^#&\n]+)", "\n".join(blocks), re.MULTILINE))
        found |= set(re.findall(r"`serve-app\s([^`]+)`", text))
    return sorted({" ".join(arguments.split()) for arguments in found})


def test_commands_are_documented() -> None:
    assert {arguments.split()[0] for arguments in documented()} == cli.COMMANDS.keys()


@pytest.mark.parametrize("arguments", documented())
def test_a_documented_command_is_one_that_there_is(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options too. What it does is tested elsewhere."""
    name, *_ = words = shlex.split(arguments)
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[name][0]), "run", seen.append)

    assert cli.main(words) == 0
    assert seen[0].command == name

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from serve_app.cli.bench.measure import Measured, Scenario
from serve_app.cli.bench.processes import Usage

HERE = Path(__file__).parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", HERE / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


compare = load()


@pytest.mark.parametrize("server", compare.SERVERS.values(), ids=lambda server: server.name)
def test_each_server_has_what_it_is_started_with(server: compare.Server, tmp_path: Path) -> None:
    filled = [server.filled(part, Path("model"), tmp_path) for part in server.command]

    assert not any("{" in part for part in filled)
    assert all(Path(part).exists() for part in filled if part.endswith((".py", ".yaml")))
    if server.venv is not None:
        assert filled[0].startswith(str(tmp_path / server.venv / "bin"))
        assert (HERE / server.venv / "requirements.txt").exists()


@pytest.mark.parametrize("file", sorted(HERE.glob("*/requirements.txt")), ids=lambda file: file.parent.name)
def test_each_peer_is_pinned_and_brings_no_torch(file: Path) -> None:
    lines = file.read_text("utf-8").split()

    assert all("==" in line for line in lines)
    assert not any(line.startswith("torch==") for line in lines)


def found(*rates: float) -> dict[Scenario, compare.Found]:
    rounds = [Measured(rate, rate * 50, 10, 0.01, 0.02, 0.03, {}, 0.1, 5.0, Usage(1, 1 << 20, 9, 3)) for rate in rates]
    return {Scenario(8, 32): compare.Found(rounds)}


def test_ratios_are_of_servers_in_the_same_round() -> None:
    """Rounds in which the whole machine was slow do not change them."""
    results = {compare.OURS: found(100, 20, 80), "peer": found(50, 10, 20)}

    lines = compare.table(results, ceiling_tokens_per_s=5000).splitlines()

    assert lines[2].split()[:6] == ["8x32", "peer", "20.0", "20.0%", "2.00", "x"]
    assert "1.00 x" in lines[1]

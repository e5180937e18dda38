"""Everything below this folder needs a CUDA device; where there is none, the run says what it left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MISSING = "torch sees no device" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
"""Why these tests are left out, where they are."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {MISSING}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if "tests/gpu/" in report.nodeid]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} GPU tests were left out: {MISSING}", yellow=True)

"""What a replica says is to be read where it was started, whatever Serve does with its standard error."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPLICA = """
import io, logging, sys
from serve_app.logs import show_log
sys.stdout = sys.stderr = io.StringIO()  # as Serve does in throughput mode
show_log({level})
show_log(logging.WARNING)
logging.getLogger("serve_app.tasks.card").info("models.m.task: embedding")
logging.getLogger("serve_app.tasks.card").warning("beware")
assert not sys.stderr.getvalue()
"""


@pytest.mark.parametrize(
    ("level", "task"), [("logging.INFO", ["INFO serve_app.tasks.card: models.m.task: embedding"]), ("", [])]
)
def test_lines_reach_the_processs_own_standard_error_once(level: str, task: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPLICA.format(level=level)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [*task, "WARNING serve_app.tasks.card: beware"]

"""How `serve-app serve` ends. Instead of `serve run` it runs a stub here, which needs no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from serve_app.cli.main import INTERRUPTED
from tests.live import free_port

SERVE = """
import os, sys
from pathlib import Path
from serve_app.cli import serve
config, serve.SAME_SIGNAL_S = Path(sys.argv[1]), float(sys.argv[2])
command = [sys.executable, str(config.parent / "stub.py")]
sys.exit(serve.until_ended(lambda: serve.ServeRun(config, dict(os.environ), command)))
"""

OBEYS = """
    import signal
    try:
        print("started", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("in good order", flush=True)
"""

HANGS = """
    import os, signal, subprocess, sys
    def deaf():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: print("asked", flush=True))
    wait = "import signal as s; [s.signal(n, s.SIG_IGN) for n in (2, 15)]; print('child', flush=True); s.pause()"
    subprocess.Popen([sys.executable, "-c", wait])
    subprocess.Popen([sys.executable, "-c", wait], start_new_session=True)  # as HAProxy's stand-in
    deaf()
    print("started", flush=True)
    while True:
        signal.pause()
"""


class Started:
    """`serve-app serve` with a stub, and what it has printed."""

    def __init__(self, folder: Path, stub: str, same_signal_s: float) -> None:
        (folder / "stub.py").write_text(textwrap.dedent(stub))
        config = {"http_options": {"port": free_port()}, "applications": []}
        (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder / "serve_config.yaml"), str(same_signal_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "SERVE_APP_TEST_FOLDER": str(folder)},
        )
        self._folder = folder

    def wait_for(self, *lines: str) -> None:
        assert self.process.stdout is not None
        missing = list(lines)
        while missing:
            line = self.process.stdout.readline()
            assert line, f"ended without {missing}"
            if line.strip() in missing:
                missing.remove(line.strip())

    def left(self) -> list[psutil.Process]:
        """Every process of it, wherever it went."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
            return process.pid != os.getpid() and environment.get("SERVE_APP_TEST_FOLDER") == str(self._folder)
        except psutil.Error:
            return False

    def press(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Started]]:
    started: list[Started] = []

    def start(stub: str, same_signal_s: float = 0.0) -> Started:
        started.append(Started(tmp_path, stub, same_signal_s))
        return started[-1]

    yield start
    for each in started:
        for process in each.left():
            process.kill()
        each.process.wait()
        assert each.process.stdout is not None
        each.process.stdout.close()


Start = Callable[..., Started]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_stops_in_good_order(start: Start, number: int) -> None:
    server = start(OBEYS)
    server.wait_for("started")
    server.press(number)
    server.wait_for("in good order")
    assert server.process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_ends_every_process_of_a_shutdown_that_hangs(start: Start, number: int) -> None:
    server = start(HANGS)
    server.wait_for("started", "child", "child")
    assert len(server.left()) == 4
    server.press(number)
    server.wait_for("asked")
    server.press(number)
    assert server.process.wait(60) == INTERRUPTED
    assert server.left() == []


def test_a_signal_that_comes_twice_at_once_is_one(start: Start) -> None:
    """As `timeout` sends it."""
    server = start(OBEYS, same_signal_s=60.0)
    server.wait_for("started")
    server.press(signal.SIGTERM)
    server.press(signal.SIGTERM)
    server.wait_for("in good order")
    assert server.process.wait(60) == 0

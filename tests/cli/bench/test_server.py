from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serve_app.cli.bench.corpus import Corpus
from serve_app.cli.bench.server import ServerError, answers, launched
from serve_app.cli.bench.wire import Prepared, Target, prepare

PROGRAM = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(int(sys.argv[2])); self.send_header("content-length", "2"); self.end_headers()
        self.wfile.write(b"[]")

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
try:
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
except KeyboardInterrupt:
    print("stopped by Ctrl-C", flush=True)
"""


@pytest.fixture
def target() -> Target:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Target("127.0.0.1", free.getsockname()[1])


@pytest.fixture
def probe(target: Target) -> Prepared:
    return prepare(Corpus(("hello",), (3,)), [3], 1, target)[0]


def command(target: Target, status: int = 200) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(target.port), str(status)]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_server_is_up_inside_and_all_of_it_gone_afterwards(target: Target, probe: Prepared, tmp_path: Path) -> None:
    log = tmp_path / "log"

    with launched(command(target), target, probe, log) as pid:
        assert answers(target, probe)
        child = int(log.read_text().split()[1])
        assert is_running(pid)
        assert is_running(child)

    assert "stopped by Ctrl-C" in log.read_text()
    assert not is_running(pid)
    assert not is_running(child)


def test_it_is_stopped_when_the_measurement_fails(target: Target, probe: Prepared, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="measurement"),
        launched(command(target), target, probe, tmp_path / "log"),
    ):
        raise RuntimeError("measurement")

    assert not answers(target, probe)


def test_nothing_is_started_where_another_server_listens(target: Target, probe: Prepared, tmp_path: Path) -> None:
    with launched(command(target), target, probe, tmp_path / "log"):
        with (
            pytest.raises(ServerError, match=f"{target.port} has a server already"),
            launched(command(target), target, probe, tmp_path / "other"),
        ):
            pass
        assert answers(target, probe)

    assert not (tmp_path / "other").exists()


def test_a_server_that_ends_is_reported_with_what_it_said(target: Target, probe: Prepared, tmp_path: Path) -> None:
    dying = [sys.executable, "-c", "import sys; sys.exit('no such model')"]

    with (
        pytest.raises(ServerError, match=r"(?s)status 1.*no such model"),
        launched(dying, target, probe, tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_gets_ready_is_given_up(target: Target, probe: Prepared, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="does not answer /embed in time"),
        launched(command(target, status=503), target, probe, tmp_path / "log", timeout_s=1.0),
    ):
        pass


def test_ctrl_c_reaches_a_server_started_from_a_background_job(target: Target, tmp_path: Path) -> None:
    """Shells start those with Ctrl-C ignored."""
    log = tmp_path / "log"
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import sys; from pathlib import Path\n"
        "from tests.cli.bench.test_server import command, launched, prepare, Corpus, Target\n"
        f"target = Target('127.0.0.1', {target.port})\n"
        "probe = prepare(Corpus(('hello',), (3,)), [3], 1, target)[0]\n"
        f"with launched(command(target), target, probe, Path({str(log)!r})): pass\n"
    )

    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])

    assert "stopped by Ctrl-C" in log.read_text()

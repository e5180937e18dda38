from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from serve_app.cli.bench.processes import ServerProcesses, find_server


@dataclass(frozen=True)
class Program:
    process: subprocess.Popen[str]
    said: str
    """Its first line."""

    @property
    def pid(self) -> int:
        return self.process.pid


Start = Callable[[str], Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python program; it has come to its first `print` when this returns."""
    running: list[subprocess.Popen[str]] = []

    def run(program: str) -> Program:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None
        return Program(process, process.stdout.readline())

    yield run
    for process in running:
        process.kill()
        process.communicate()


PARENT = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=subprocess.PIPE)
    input()
"""


def test_children_belong_to_a_server(start: Start) -> None:
    parent = start(PARENT)

    usage = ServerProcesses((parent.pid,)).usage()

    assert usage.processes == 2
    assert usage.threads >= 2
    assert usage.descriptors >= 6
    assert usage.uss_bytes > 1_000_000
    assert parent.pid in {resident.pid for resident in usage.resident}
    assert all(resident.kind == "other" and resident.rss_bytes > 1_000_000 for resident in usage.resident)


def test_a_process_that_is_named_twice_counts_once(start: Start) -> None:
    parent = start(PARENT)
    both = ServerProcesses((parent.pid,))._cpu_times()

    assert ServerProcesses((parent.pid, *(pid for (pid, _), _ in both))).usage().processes == 2


def test_cpu_time_is_counted_from_the_mark(start: Start) -> None:
    worker = start(
        """
        import time
        def burn(seconds):
            while time.process_time() < seconds: pass
        burn(0.5); print("up", flush=True)
        input(); burn(0.8); print("done", flush=True); input()
        """
    )
    processes = ServerProcesses((worker.pid,))
    processes.mark()
    before = processes.cpu_s()

    assert worker.process.stdin is not None
    assert worker.process.stdout is not None
    worker.process.stdin.write("go\n")
    worker.process.stdin.flush()
    worker.process.stdout.readline()

    assert before < 0.1
    assert processes.cpu_s() == pytest.approx(0.3, abs=0.1)


def test_a_server_that_has_gone_uses_nothing(start: Start) -> None:
    process = start("print('up', flush=True); input()")
    processes = ServerProcesses((process.pid,))
    process.process.kill()
    process.process.wait()

    assert processes.cpu_s() == 0
    assert processes.usage().processes == 0


LISTENS = """
    import socket
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    input()
"""


def test_a_server_is_found_by_its_port(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(LISTENS.replace("0))", f"{port}))"))

    found = find_server(port)

    assert found is not None
    assert found.roots == (process.pid,)


def test_no_server_is_found_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    assert find_server(port) is None


def named(session: str, program: str = "print('up', flush=True); input()") -> str:
    """A program whose command line names a Ray session, as those of Ray's services do."""
    return f"'--log_dir=/somewhere/{session}/logs'\n{program}"


PROXY = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"

RAYLET = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {PROXY!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
input()
"""


def test_all_of_a_ray_session_is_found_from_the_process_that_listens(start: Start) -> None:
    """The head's services are not above or below what listens: their command lines tell."""
    session = "session_2026-01-02_03-04-05_123456_78"
    service = start(named(session))
    stranger = start(named(session + "9"))
    raylet = start(named(session, RAYLET))
    port, listening = map(int, raylet.said.split())

    found = find_server(port)

    assert found is not None
    assert {service.pid, raylet.pid, listening} <= set(found.roots)
    assert stranger.pid not in found.roots

"""Starting a server for a measurement, waiting until it answers, and leaving no process of it behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from serve_app.cli.bench.wire import Prepared, Target
from serve_app.errors import ServeAppError

_POLL_S = 0.5
_CONNECT_S = 5.0


class ServerError(ServeAppError):
    """The server to be measured did not come up."""


@contextlib.contextmanager
def launched(
    command: Sequence[str],
    target: Target,
    probe: Prepared,
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float = 300.0,
) -> Iterator[int]:
    """Start `command` (in `folder`) and yield its process id once it answers `probe` with 200; stop it as Ctrl-C would.

    What it prints goes to `log`. Raises ServerError, with the end of the log, if it ends or takes too long, and before
    it starts anything if another server has the port already, which would be measured in its place.
    """
    if _is_listening(target):
        raise ServerError(f"{target.host}:{target.port} has a server already; stop that one first")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            cwd=folder,
            start_new_session=True,
            preexec_fn=_heed_ctrl_c,
        )
    try:
        _wait_until_ready(process, target, probe, log, time.monotonic() + timeout_s)
        yield process.pid
    finally:
        _stop(process)


def _heed_ctrl_c() -> None:
    """A shell starts background jobs with Ctrl-C ignored, which their children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_until_ready(
    process: subprocess.Popen[bytes], target: Target, probe: Prepared, log: Path, deadline: float
) -> None:
    while not answers(target, probe):
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the server does not answer {target.route} in time:\n{_tail(log)}")
        time.sleep(_POLL_S)


def _is_listening(target: Target) -> bool:
    """Whether anybody takes connections there."""
    try:
        socket.create_connection((target.host, target.port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def answers(target: Target, probe: Prepared, timeout_s: float = 10.0) -> bool:
    """Whether the server answers this request with 200."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout_s)
    try:
        connection.connect()
        connection.sock.sendall(probe.payload)
        response = http.client.HTTPResponse(connection.sock)
        response.begin()
        return response.status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes], patience_s: float = 60.0) -> None:
    """Ctrl-C for the process; whatever of its tree is left afterwards is killed."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    _, alive = psutil.wait_procs(tree, timeout=5.0)
    for left in alive:
        with contextlib.suppress(psutil.Error):
            left.kill()
    psutil.wait_procs(alive, timeout=5.0)
    process.kill()
    process.wait()


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-lines:])

"""`serve-app serve`: `serve run` that checks the file and the ports first, says when it is ready, and ends when it
cannot start.

`serve run` alone keeps waiting when an application cannot be deployed, prints nothing when it is ready, and does not
shut down on SIGTERM, which is what process supervisors send.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.cli import check
from serve_app.cli.dashboard import DEFAULT_ADDRESS, Dashboard, DashboardError, failures
from serve_app.cli.environment import server_environment
from serve_app.cli.main import INTERRUPTED
from serve_app.cli.serve_file import parse_file

POLL_S = 0.5
STATUS_POLL_S = 2.0
STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL_S = 0.5
"""`timeout` and some supervisors send one signal twice, to the process and to its group: what comes so soon after the
first is no second wish."""

LAST_WORDS_S = 1.0
"""How long what `serve run` has printed is waited for. A process that it has left behind may keep its output open."""

_KILL_ROUNDS = 20
_MARK = "SERVE_APP_SERVER"
"""Environment variable of all processes of one server."""

DASHBOARD = re.compile(r"dashboard at (?:\x1b\[[0-9;]*m)*(http://[^\s\x1b]+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="the Serve config file to run"
    )


def run(args: argparse.Namespace) -> int:
    refused = check.run(args)
    if refused:
        return refused
    file, _ = parse_file(args.config)
    assert file is not None, "checked above"
    with server_environment(file) as (environment, findings):
        if check.show(args.config, findings):
            return 1
        return until_ended(lambda: ServeRun(args.config, environment))


def until_ended(start: Callable[[], ServeRun]) -> int:
    """Start a server; its exit code. The first Ctrl-C or SIGTERM stops it in good order, a second one at once."""
    held: list[int] = []
    for number in STOPPING:
        signal.signal(number, lambda number, _: held.append(number))
    server = start()
    for number in STOPPING:
        signal.signal(number, lambda *_: server.stop())
    if held:  # while it was being started
        server.stop()
    return server.wait()


class ServeRun:
    """A `serve run` in a process group of its own, so that it gets exactly one interrupt, from here.

    `command` is what runs the file, `serve run` unless given.
    """

    def __init__(self, config: Path, environment: Mapping[str, str], command: Sequence[str] | None = None) -> None:
        self._url, self._applications = _address(yaml.safe_load(config.read_text()))
        self._warnings = [finding.reason for finding in check.check_file(config) if finding.key == "http_options.host"]
        self._dashboard: str | None = None
        self._stopped_at: float | None = None
        self._killed = False
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [*(command or (str(Path(sys.executable).parent / "serve"), "run")), str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**environment, _MARK: self._mark},
            start_new_session=True,
            # A shell that starts this in the background hands down an ignored interrupt.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
        self._relaying = threading.Thread(target=self._relay, daemon=True)
        self._relaying.start()

    def wait(self) -> int:
        """Until `serve run` has ended: 0 after `stop`, else its exit code, or 1 if the application cannot start."""
        try:
            failure = self._watch_start()
        except BaseException:
            self.stop()
            raise
        if failure is not None:
            print(f"serve-app: the application cannot be deployed:\n{failure}", file=sys.stderr, flush=True)
            self.stop()
        code = self._wait()
        self._relaying.join(LAST_WORDS_S)
        if self._killed:
            self._kill_all()  # what was being started when the others were killed
            return INTERRUPTED
        if failure is not None:
            return 1
        return code if self._stopped_at is None else 0

    def _wait(self) -> int:
        """The exit code of `serve run`. A signal that comes just before a wait without end would not be seen in it."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(POLL_S)

    def stop(self) -> None:
        """Interrupt it once; it then finishes what is under way and ends its cluster. If called again, kill it all.

        For signal handlers, which must neither use a stream nor take a lock that they may have interrupted.
        """
        if self._stopped_at is not None:
            if time.monotonic() - self._stopped_at > SAME_SIGNAL_S:
                os.write(2, b"serve-app: ending every process of the server now\n")
                self._killed = True
                self._kill_all()
        elif self._process.poll() is None:
            self._stopped_at = time.monotonic()
            os.write(2, b"serve-app: stopping; another Ctrl-C ends it at once\n")
            self._process.send_signal(signal.SIGINT)

    def _kill_all(self) -> None:
        """Kill every process that `serve run` has started, also those that have left its process group.

        All of them have the mark in their environment, and none of a cluster that it has only joined.
        """
        for _ in range(_KILL_ROUNDS):  # one may have started another meanwhile
            left = [process for process in psutil.process_iter() if _is_marked(process, self._mark)]
            if not left:
                return
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs([process for process in left if process.pid != self._process.pid], timeout=POLL_S)

    def _relay(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            found = DASHBOARD.search(line)
            if found:
                self._dashboard = found.group(1)

    def _watch_start(self) -> str | None:
        """Until it is ready, is stopping or has ended: None; or the reason why it cannot start."""
        polls = 0
        while True:
            time.sleep(POLL_S)
            if self._process.poll() is not None or self._stopped_at is not None:
                return None
            polls += 1
            if _answers(f"{self._url}/ready"):
                print(f"Ready: {self._url} (documentation at {self._url}/docs). Ctrl-C stops it.", flush=True)
                print(f"How it fares: {self._status_command()}", flush=True)
                for warning in self._warnings:  # again, because what Ray prints has pushed the first one away
                    print(f"WARNING: {warning}", file=sys.stderr, flush=True)
                return None
            if polls % (STATUS_POLL_S / POLL_S) == 0:
                reasons = list(self._failures())
                if reasons:
                    return "\n".join(reasons)

    def _status_command(self) -> str:
        """As it can be given to a shell, also where the virtual environment is not active."""
        command = Path(sys.argv[0])
        if command.name != "serve-app":
            command = Path(sys.executable).with_name("serve-app")
        address = self._dashboard or DEFAULT_ADDRESS
        return f"{command} status" + ("" if address == DEFAULT_ADDRESS else f" --address {address}")

    def _failures(self) -> Iterator[str]:
        if self._dashboard is None:
            return
        with suppress(DashboardError):  # it is asked again
            for name, application in Dashboard(self._dashboard).details()["applications"].items():
                if name in self._applications:
                    yield from failures(application)


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _address(config: dict[str, Any]) -> tuple[str, set[str]]:
    """Where clients are answered, and the names of all applications."""
    http = config.get("http_options") or {}
    host, port = http.get("host", "127.0.0.1"), http.get("port", 8000)
    applications = config["applications"]
    prefixes = [application.get("route_prefix", "/") for application in applications]
    prefix = next((prefix for prefix in prefixes if prefix is not None), "/").rstrip("/")
    local = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{local}:{port}{prefix}", {application.get("name", "default") for application in applications}


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import orjson
import pytest

from serve_app.cli.bench.processes import Usage
from serve_app.cli.bench.soak import BOUNDS, MIB, Growth, SoakSample, judge, mixed_requests
from serve_app.cli.bench.wire import Prepared
from serve_app.cli.main import main

SERVER = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LEAK, kept = sys.argv[2], []

def leak():
    if LEAK == "memory":
        kept.append(bytearray(os.urandom(256)) * 512)
    elif LEAK == "descriptors":
        kept.append(open(os.devnull))
    elif LEAK == "tasks":
        kept.append(None)
    elif LEAK == "threads" and len(kept) < 2000:
        kept.append(threading.Thread(target=threading.Event().wait, daemon=True))
        kept[-1].start()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536
    def do_POST(self):
        inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        leak()
        body = json.dumps([[1.0, 2.0]] * len(inputs)).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
        threading.Event().wait(0.01)
    def do_GET(self):
        body = (
            'ray_serve_app_event_loop_tasks{replica="a"} 7.0\\n'
            'ray_serve_app_event_loop_tasks{replica="b"} %d.0\\n' % (len(kept) if LEAK == "tasks" else 5)
        ).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass

ThreadingHTTPServer.daemon_threads = True
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("up", flush=True)
server.serve_forever()
"""

Start = Callable[[str], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server that leaks what it is told to; its port."""
    running: list[subprocess.Popen[str]] = []

    def run(leak: str) -> int:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        command = [sys.executable, "-c", SERVER, str(port), leak]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        running[-1].stdout.readline()
        return port

    yield run
    for process in running:
        process.kill()
        process.communicate()


def soak(port: int, file: Path) -> tuple[int, dict[str, bool]]:
    """The command's status, and which quantities it found to grow."""
    load = ["--texts", "64", "--warmup", "0.5", "--soak", "6", "--soak-interval", "0.2", "--soak-connections", "4"]
    status = main(["bench", "--url", f"http://127.0.0.1:{port}", *load, "--json", str(file)])
    told = orjson.loads(file.read_bytes())
    assert told["answers"] > 50
    return status, {growth["quantity"]: growth["grows"] for growth in told["growth"]}


@pytest.mark.parametrize(
    ("leak", "quantity"),
    [("memory", "uss_bytes"), ("descriptors", "descriptors"), ("threads", "threads"), ("tasks", "tasks")],
)
def test_a_deliberate_leak_is_caught(leak: str, quantity: str, start: Start, tmp_path: Path) -> None:
    status, grows = soak(start(leak), tmp_path / "out.json")

    assert grows[quantity]
    assert status == 1


def test_a_server_that_does_not_leak_is_let_through(start: Start, tmp_path: Path) -> None:
    status, grows = soak(start("nothing"), tmp_path / "out.json")

    assert not any(grows.values())
    assert status == 0


def samples(uss: Sequence[float], step_s: float = 60.0) -> list[SoakSample]:
    return [SoakSample(i * step_s, i, Usage(5, round(value), 100, 40)) for i, value in enumerate(uss)]


def memory(uss: Sequence[float]) -> Growth:
    (found,) = (growth for growth in judge(samples(uss)) if growth.quantity == "uss_bytes")
    return found


def test_a_server_that_fills_its_caches_first_does_not_grow() -> None:
    assert not memory([500 * MIB + min(i, 20) * 50 * MIB for i in range(60)]).grows


def test_noise_is_no_growth() -> None:
    assert not memory([1000 * MIB + (-1) ** i * 10 * MIB for i in range(60)]).grows


def test_slow_and_steady_growth_is_caught_in_a_long_run() -> None:
    growth = memory([1000 * MIB + i * 4 * MIB for i in range(60)])

    assert growth.grows
    assert growth.rise == pytest.approx(4 * MIB * 29 / 2, rel=0.01)
    assert growth.per_hour == pytest.approx(240 * MIB, rel=0.01)


def test_what_happened_in_the_first_half_does_not_count() -> None:
    assert not memory([5000 * MIB] * 30 + [1000 * MIB] * 30).grows


def test_what_a_server_does_not_tell_is_not_judged() -> None:
    assert {growth.quantity for growth in judge(samples([1.0] * 20))} == set(BOUNDS) - {"tasks"}


def test_too_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="too few"):
        judge(samples([1.0] * 7))


def test_requests_of_all_sizes_come_mixed() -> None:
    requests = mixed_requests(lambda texts: [Prepared(b"", i, texts, 1) for i in range(64 // texts)], seed=0)

    sizes = [request.texts for request in requests]
    assert {size: sizes.count(size) for size in sizes} == {1: 64, 4: 16, 32: 2}
    assert sizes != sorted(sizes)
    assert len(set(sizes[:20])) > 1

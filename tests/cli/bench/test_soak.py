from __future__ import annotations

import math
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import orjson
import pytest

from serve_app.cli.bench.processes import Resident, Usage, kind_of
from serve_app.cli.bench.soak import (
    BOUNDS,
    MIB,
    PROCESS_BOUNDS,
    Growth,
    ProcessGrowth,
    SoakReport,
    SoakSample,
    judge,
    judge_processes,
    mixed_requests,
    soak_text,
)
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
def test_a_deliberate_leak_is_caught(
    leak: str, quantity: str, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, grows = soak(start(leak), tmp_path / "out.json")

    assert grows[quantity]
    assert status == 1
    [process] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other ")]
    assert ("GROWS" in process) == (leak == "memory")


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


def resident(mib: Sequence[float], kind: str = "model replica", pid: int = 1, step_s: float = 15.0) -> list[SoakSample]:
    return [
        SoakSample(i * step_s, i, Usage(1, 0, 0, 0, (Resident(pid, kind, round(value * MIB)),)))
        for i, value in enumerate(mib)
    ]


def of_process(samples: Sequence[SoakSample]) -> ProcessGrowth:
    (growth,) = judge_processes(samples)
    return growth


NOISE = [20 * math.sin(i * i) for i in range(60)]
"""MiB; of a replica whose batches come and go."""


def test_a_process_that_stays_as_it_is_does_not_grow() -> None:
    growth = of_process(resident([358 + noise for noise in NOISE]))

    assert not growth.grows
    assert growth.kind == "model replica"


def test_a_replica_that_went_from_377_to_740_mb_in_500_s_grows() -> None:
    """As one did whose compiled kernels were all kept: fast at first, and then ever more slowly."""
    seconds = range(0, 900, 15)
    course = [377 + (740 - 377) * (at / 500) ** 0.7 for at in seconds]
    growth = of_process(resident([value + noise for value, noise in zip(course, NOISE, strict=True)]))

    assert growth.grows
    assert growth.rise == pytest.approx((course[-1] - course[8]) * MIB, rel=0.1)


def test_what_a_process_takes_in_its_first_two_minutes_does_not_count() -> None:
    assert not of_process(resident([100 + 50 * min(i, 8) + NOISE[i] for i in range(60)])).grows


def test_the_two_minutes_are_those_of_each_process() -> None:
    late = resident([100 + 50 * min(i, 8) + NOISE[i] for i in range(30)])
    shifted = [SoakSample(sample.at_s + 450, 0, sample.usage) for sample in late]

    assert not of_process(shifted).grows


def test_in_a_short_run_half_of_the_samples_are_for_settling() -> None:
    growth = of_process(resident([100 + 400 * min(i, 4) for i in range(10)], step_s=0.2))

    assert not growth.grows


def test_one_process_that_grows_is_not_hidden_by_another_that_shrinks() -> None:
    growing = resident([400 + 4 * i for i in range(60)], pid=1)
    shrinking = resident([900 - 4 * i for i in range(60)], pid=2)
    both = [
        SoakSample(one.at_s, 0, Usage(2, 1300 * MIB, 0, 0, (*one.usage.resident, *other.usage.resident)))
        for one, other in zip(growing, shrinking, strict=True)
    ]

    assert {growth.pid: growth.grows for growth in judge_processes(both)} == {1: True, 2: False}
    report = SoakReport(both, [], judge_processes(both), answers=1, texts=1, lengths=1)
    assert report.failed
    assert "model replica     GROWS         1" in soak_text(report)


def test_a_few_samples_with_much_noise_are_no_growth() -> None:
    """The line rises by more than is allowed, and may as well be flat."""
    growth = of_process(resident([400, 400, 400, 400, 400, 560, 330, 540, 500], step_s=1.0))

    assert growth.rise > growth.allowed
    assert not growth.grows


def test_a_process_that_came_at_the_end_is_not_judged() -> None:
    assert judge_processes(resident([100.0, 900.0, 1700.0])) == []


def test_a_bound_is_stated_for_every_kind_of_process() -> None:
    commands = [
        ["ray::ServeReplica:bge-v1.5:bge-v1.5-model"],
        ["ray::ServeReplica:bge-v1.5:bge-v1.5-tokenizer.forward"],
        ["ray::ServeReplica:serve_app:ingress"],
        ["ray::ServeController.listen_for_change"],
        ["ray::HAProxyManager"],
        ["/usr/sbin/haproxy", "-f", "haproxy.cfg"],
        ["/opt/raylet", "--session=a-model"],
        [],
    ]

    kinds = [kind_of(command) for command in commands]
    assert kinds == [
        "model replica",
        "tokenizer replica",
        "ingress replica",
        "Serve",
        "Serve",
        "HAProxy",
        "other",
        "other",
    ]
    assert set(kinds) == set(PROCESS_BOUNDS)

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from serve_app.model import host
from serve_app.model.host import available_cores, available_memory_bytes, govern_threads

MIB = 1 << 20
MACHINE = 9000 * MIB
UNLIMITED = 9223372036854771712
"""What version 1 says where no limit is set."""

FAULTS = """
import resource, torch
from serve_app.model.host import keep_freed_memory
kept = keep_freed_memory()
def work():
    for _ in range(20):
        torch.ones(4 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_threads_never_exceed_the_cores() -> None:
    before = torch.get_num_threads()
    try:
        assert govern_threads(10_000) == available_cores() == torch.get_num_threads()
        assert govern_threads(1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_freed_activations_are_not_faulted_in_again() -> None:
    answer = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, faults = map(int, answer.split())
    assert not kept or faults < 100


GIVES_BACK = """
import psutil, torch
from serve_app.model.host import give_back_freed_memory, keep_freed_memory
kept = keep_freed_memory()
[torch.ones(4 << 20) for _ in range(16)]
resident = lambda: psutil.Process().memory_info().rss
before = resident()
give_back_freed_memory()
print(int(kept), before - resident())
"""


def test_freed_memory_is_given_back_when_asked() -> None:
    answer = subprocess.run([sys.executable, "-c", GIVES_BACK], capture_output=True, text=True, check=True).stdout
    kept, given_back = map(int, answer.split())
    assert not kept or given_back > 200 * MIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))


def version_2(limit: str, usage: int, inactive_file: int = 0, high: str = "max") -> dict[str, str]:
    return {
        "memory.max": limit,
        "memory.high": high,
        "memory.current": str(usage),
        "memory.stat": f"anon 1\nfile 5\ninactive_file {inactive_file}\nactive_file 7",
    }


def version_1(limit: int, usage: int, inactive_file: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": str(limit),
        "memory.usage_in_bytes": str(usage),
        "memory.stat": f"cache 1\ninactive_file 5\ntotal_inactive_file {inactive_file}",
    }


CGROUPS: dict[str, tuple[list[str], list[str], dict[str, dict[str, str]], int]] = {
    # name: (lines of /proc/self/cgroup, mounts as "root point kind options", files of each cgroup, MiB that are left)
    "none": (["0::/"], [], {}, 9000),
    "version 2": (["0::/a/b"], ["/ u cgroup2 rw"], {"u/a/b": version_2(str(500 * MIB), 300 * MIB)}, 200),
    "page cache that is not in use is left": (
        ["0::/a"],
        ["/ u cgroup2 rw"],
        {"u/a": version_2(str(500 * MIB), 300 * MIB, 100 * MIB)},
        300,
    ),
    "the soft limit of version 2": (
        ["0::/a"],
        ["/ u cgroup2 rw"],
        {"u/a": version_2(str(500 * MIB), 300 * MIB, high=str(400 * MIB))},
        100,
    ),
    "a soft limit alone": (
        ["0::/a"],
        ["/ u cgroup2 rw"],
        {"u/a": version_2("max", 300 * MIB, high=str(400 * MIB))},
        100,
    ),
    "no limit": (["0::/a"], ["/ u cgroup2 rw"], {"u/a": version_2("max", 300 * MIB)}, 9000),
    "a limit above": (
        ["0::/a/b"],
        ["/ u cgroup2 rw"],
        {"u/a/b": version_2("max", 300 * MIB), "u/a": version_2(str(700 * MIB), 600 * MIB)},
        100,
    ),
    "the narrowest counts": (
        ["0::/a/b"],
        ["/ u cgroup2 rw"],
        {"u/a/b": version_2(str(350 * MIB), 300 * MIB), "u/a": version_2(str(700 * MIB), 600 * MIB)},
        50,
    ),
    "more used than allowed": (
        ["0::/a"],
        ["/ u cgroup2 rw"],
        {"u/a": version_2(str(500 * MIB), 501 * MIB)},
        0,
    ),
    "more allowed than there is": (
        ["0::/a"],
        ["/ u cgroup2 rw"],
        {"u/a": version_2(str(50_000 * MIB), 1)},
        9000,
    ),
    "a namespace of its own": (["0::/"], ["/ u cgroup2 rw"], {"u": version_2(str(500 * MIB), 300 * MIB)}, 200),
    "a container that sees no namespace": (
        ["4:memory:/docker/abc"],
        ["/docker/abc m cgroup rw,memory"],
        {"m": version_1(500 * MIB, 300 * MIB)},
        200,
    ),
    "a group outside of the namespace": (
        ["0::/../other"],
        ["/ u cgroup2 rw"],
        {"u": version_2(str(500 * MIB), 300 * MIB)},
        200,
    ),
    "a mount that shows another group": (
        ["0::/a"],
        ["/b u cgroup2 rw"],
        {"u": version_2(str(500 * MIB), 300 * MIB)},
        200,
    ),
    "version 1": (
        ["5:cpu,cpuacct:/x", "4:memory:/a", "1:name=systemd:/y"],
        ["/ c cgroup rw,cpu,cpuacct", "/ m cgroup rw,memory"],
        {"m/a": version_1(500 * MIB, 300 * MIB, 50 * MIB), "c/x": version_1(1, 1), "m/x": version_1(1, 1)},
        250,
    ),
    "version 1 without a limit": (
        ["4:memory:/a"],
        ["/ m cgroup rw,memory"],
        {"m/a": version_1(UNLIMITED, 300 * MIB)},
        9000,
    ),
    "both versions": (
        ["4:memory:/a", "0::/b"],
        ["/ m cgroup rw,memory", "/ u cgroup2 rw"],
        {"m/a": version_1(500 * MIB, 300 * MIB), "u/b": version_2(str(400 * MIB), 300 * MIB)},
        100,
    ),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_cgroups_bound_what_is_available(name: str, machine: None, tmp_path: Path) -> None:
    groups, mounts, files, left_mib = CGROUPS[name]
    process = tmp_path / "proc"
    process.mkdir()
    (process / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    (process / "mountinfo").write_text(
        "21 1 0:20 / /proc rw - proc proc rw\n"
        + "".join(
            f"30 21 0:27 {root} {tmp_path / point} rw,relatime shared:9 - {kind} {kind} {options}\n"
            for root, point, kind, options in map(str.split, mounts)
        )
    )
    for folder, contents in files.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file, text in contents.items():
            (tmp_path / folder / file).write_text(f"{text}\n")
    assert available_memory_bytes(process) == left_mib * MIB


def test_without_cgroups_the_machine_counts(machine: None, tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path / "nothing") == MACHINE


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A real cgroup below this process's, with a limit of 1 GiB."""
    made = next(filter(None, map(limited_child, host._memory_cgroups(Path("/proc/self")))), None)
    if made is None:
        pytest.skip(
            "this needs root, and a cgroup of this process (v1 or v2, mounted to be written) that counts memory"
        )
    yield made
    made.rmdir()


def limited_child(cgroup: Path) -> Path | None:
    """None where this process may not make one, or the cgroup does not count memory."""
    made = cgroup / f"serve-app-test-{uuid.uuid4().hex}"
    try:
        made.mkdir()
    except OSError:
        return None
    for limit in (made / "memory.max", made / "memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            if limit.exists():
                limit.write_text(str(1024 * MIB))
                return made
    made.rmdir()
    return None


IN_CGROUP = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from serve_app.model.host import available_memory_bytes
before = available_memory_bytes()
held = b"x" * (300 << 20)
print(before, available_memory_bytes())
"""


def test_a_real_cgroup_bounds_what_is_available(cgroup: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", IN_CGROUP, str(cgroup)], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    before, after = map(int, answer.stdout.split())
    assert 300 * MIB < before < 1024 * MIB
    assert 290 * MIB < before - after < 320 * MIB

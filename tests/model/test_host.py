from __future__ import annotations

import subprocess
import sys

import torch

from serve_app.model.host import available_cores, govern_threads

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

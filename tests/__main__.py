"""Every test, in two lanes side by side: `python -m tests [pytest's options]`.

Tests with a cluster wait more than they compute, so the others run beside them, and there is one cluster at a time.
What the cluster's lane says is shown when both have ended, and of each lane its twenty slowest tests. Every process
computes with one thread, unless OMP_NUM_THREADS says otherwise: with one for each core, each waits for cores that the
other lane has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import IO

NO_TESTS = 5
"""pytest's exit code where the options leave nothing to run in a lane."""


def start(lane: str, options: list[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-m", lane, "--durations=20", "--durations-min=1", *options]
    return subprocess.Popen(command, stdout=output, stderr=output)


def main(options: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryFile() as log:
        lanes = [start("cluster", options, log), start("not cluster", options)]
        try:
            codes = [lane.wait() for lane in reversed(lanes)]
        except KeyboardInterrupt:  # which they have got too
            codes = [lane.wait() for lane in lanes]
        log.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()
    if codes == [NO_TESTS, NO_TESTS]:
        return NO_TESTS
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

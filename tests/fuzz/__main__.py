"""Send a server of every task requests that nobody should send, and tell what it did not stand.

`python -m tests.fuzz` asks a server in this process, with tiny models; with `--live`, the example of all tasks, served
by `serve run`. `--seed 1 --only 'POST /embed' --number 12` makes one of the requests again and shows its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.held import Held, bound_faults, held_by_processes, held_here
from tests.fuzz.models import make_all
from tests.fuzz.run import Fuzz
from tests.fuzz.targets import OF_THE_CLUSTER
from tests.inprocess import running
from tests.live import examples_served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="how many at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="what they are made from (default: %(default)s)")
    parser.add_argument("--live", action="store_true", help="against a server of its own, started by `serve run`")
    parser.add_argument("--url", help="against this server, which serves the example of all tasks")
    parser.add_argument("--only", metavar="TARGET", help="one request again: its target, as in 'POST /embed'")
    parser.add_argument("--number", type=int, default=0, help="and its number")
    args = parser.parse_args()
    with _server(args.url, args.live) as (url, look):
        fuzz = Fuzz(url, args.seed, look, without=() if args.live or args.url else OF_THE_CLUSTER)
        if args.only is not None:
            print(asyncio.run(fuzz.replay(fuzz.request(args.only, args.number))))
            return
        started = time.monotonic()
        report = asyncio.run(fuzz.run(args.requests))
        print(report)
        growth = bound_faults(report.held)
        print(f"{time.monotonic() - started:.0f} s", *growth, sep="\n")
        sys.exit(bool(report.faults or growth))


@contextlib.contextmanager
def _server(url: str | None, live: bool) -> Iterator[tuple[str, Held]]:
    if url is not None:
        yield url, dict
        return
    with tempfile.TemporaryDirectory() as folder:
        if live:
            with examples_served(Path(folder), {"body_timeout_s": 1.0}) as served:
                yield served.base_url, lambda: held_by_processes(served.processes())
        else:
            models = make_all(Path(folder) / "models")
            with running(models, Path(folder) / "cache", body_timeout_s=0.5) as application:
                yield application.base_url, lambda: held_here(application.loop)


if __name__ == "__main__":
    main()

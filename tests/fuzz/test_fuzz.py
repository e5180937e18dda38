"""Thousands of odd, wrong and broken requests leave every task's server as it was."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from tests.fuzz.held import bound_faults, held_here
from tests.fuzz.requests import make
from tests.fuzz.run import Fuzz
from tests.fuzz.schemas import Valid
from tests.fuzz.targets import OF_THE_CLUSTER, Target
from tests.inprocess import Running

REQUESTS = 20_000
SEED = 0


class Log(logging.Handler):
    """Keeps what must not be logged: an input, and any failure that nobody expected."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        told = logging.Formatter().format(record)
        if record.levelno >= logging.ERROR or "canary" in told.lower():
            self.wrong.append(told)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.mark.timeout(600)
def test_nothing_that_is_sent_is_a_5xx_or_comes_back_or_leaves_a_trace(application: Running, log: Log) -> None:
    fuzz = Fuzz(application.base_url, SEED, lambda: held_here(application.loop), without=OF_THE_CLUSTER)
    logging.getLogger("serve_app").addHandler(log)
    try:
        report = asyncio.run(fuzz.run(REQUESTS))
    finally:
        logging.getLogger("serve_app").removeHandler(log)
    print(report)
    assert not report.faults, str(report)
    assert not log.wrong
    assert not bound_faults(report.held), str(report)
    assert report.sent >= REQUESTS
    assert httpx.get(f"{application.base_url}/ready", timeout=60).status_code == 200
    assert report.statuses[200] > report.sent / 4, "too few get as far as the models"


def test_a_request_is_made_again_by_its_seed_target_and_number() -> None:
    target = Target("POST", "/embed", "embedding", {"inputs": "a"}, {"type": "object"})
    valid = Valid({"components": {"schemas": {}}})
    made = [make(target, 3, number, valid).data for number in range(200)]
    assert made == [make(target, 3, number, valid).data for number in range(200)]
    assert len(set(made)) > 150
    assert made != [make(target, 4, number, valid).data for number in range(200)]

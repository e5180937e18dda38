"""The real ingress, tokenizers and models of every task, in this process, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.models import make_all
from tests.inprocess import Running, running

BODY_TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzz")
    with running(make_all(folder / "models"), folder / "cache", body_timeout_s=BODY_TIMEOUT_S) as application:
        yield application

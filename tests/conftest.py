"""What all tests share: the application as `serve_config.yaml` says, and the two lanes in which tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import Live, served


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Started once for all tests that only ask it something; those that kill its replicas or end it start their own."""
    with served() as running:
        yield running


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where pytest has several processes, one takes all tests with a cluster, so that there is one cluster at a time.

    Other files go whole to whichever process is free.
    """
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)
    for item in items:
        lane = "cluster" if item.get_closest_marker("cluster") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(lane))

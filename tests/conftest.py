"""The application as `serve_config.yaml` says, started once for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import Live, served


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Tests that kill its replicas or end it start one of their own."""
    with served() as running:
        yield running

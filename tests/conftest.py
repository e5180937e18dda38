"""The application as `serve_config.yaml` says, started once for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.live import Live, served
from tests.proxy import through_proxy

with suppress(ModuleNotFoundError):  # tests/gpu runs where hypothesis is not installed
    from hypothesis import HealthCheck, settings

    # Both are limits in wall-clock time, which a busy machine exceeds.
    settings.register_profile("serve_app", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("serve_app")


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Tests that kill its replicas or end it start one of their own. It knows a proxy that does not answer, because
    nothing in it may need one.
    """
    with served(environment=through_proxy("http://127.0.0.1:9")) as running:
        yield running

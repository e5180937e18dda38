"""The servers that every client has to work with: the HTTP edge alone, and the whole application."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.ingress.edge import FakeService, edge_app, served_in_thread
from tests.live import Live


@pytest.fixture(scope="session", params=["edge", pytest.param("application", marks=pytest.mark.cluster)])
def base_url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "edge":
        with served_in_thread(edge_app(FakeService())) as url:
            yield url
    else:
        running: Live = request.getfixturevalue("live")
        yield running.base_url


@pytest.fixture(scope="session")
def info(base_url: str) -> dict[str, Any]:
    """What the server says of its only model."""
    answer: dict[str, Any] = httpx.get(f"{base_url}/info", timeout=60).json()
    return answer


@pytest.fixture(scope="session")
def model(info: dict[str, Any]) -> str:
    return str(info["served_model_name"])

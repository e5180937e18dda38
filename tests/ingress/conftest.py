"""A service without Ray, and a client that talks to the edge over it in the same process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.ingress.edge import FakeService, client_of


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client

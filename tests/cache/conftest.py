"""A local hub with a tiny model, and a cache root of its own for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.config import CacheConfig, ModelConfig
from tests.hub.models import write_tiny_bert
from tests.hub.server import LocalHub, local_hub

REPO = "tiny-org/tiny-bert"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture
def hub(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The endpoint of huggingface_hub for this test, with `tiny_bert` as tiny-org/tiny-bert."""
    with local_hub() as hub:
        hub.add(REPO, tiny_bert)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(root=str(tmp_path / "models"), download_timeout_s=60.0)


@pytest.fixture
def tiny_model(hub: LocalHub) -> ModelConfig:
    (revision,) = hub.repositories[REPO]
    return ModelConfig(name="tiny", source=REPO, revision=revision)

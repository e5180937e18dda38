"""Serve deployments behind the gate, on several nodes, against the local hub."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.util import list_named_actors

from serve_app.app import build_model
from serve_app.cache.node import NodeCache
from serve_app.cache.prewarm import Membership, cache_status, ensure_local, version_here, warmer_actors
from serve_app.cache.store import READY
from serve_app.cache.warmer import APPLICATIONS, warmer_name
from serve_app.config import CacheConfig, ModelConfig
from serve_app.errors import DiskFullError, VersionGoneError
from serve_app.types import VersionCall
from serve_app.versions import version_of
from tests.cluster.prewarm_cluster import (
    ROOT,
    Nodes,
    files_with,
    metrics_of_all_nodes,
    nodes_of_a_cluster,
    wait_until,
)
from tests.hub.models import write_tiny_bert
from tests.hub.server import Fault, LocalHub, local_hub

pytestmark = pytest.mark.cluster

CACHE = CacheConfig(root=ROOT, download_timeout_s=120.0)
CANARY = "hf_canary0123456789"
NEVER = "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S"
LONGER_THAN_SERVE_WAITS_S = 15.0
"""Its default is 10 s."""


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub() as hub:
        hub.required_token = CANARY
        yield hub


@pytest.fixture(scope="module")
def nodes(hub: LocalHub) -> Iterator[Nodes]:
    config = yaml.safe_load(Path("serve_config.yaml").read_text())
    never = {NEVER: config["controller_options"]["runtime_env"]["env_vars"][NEVER]}
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": CANARY, **never}
    with nodes_of_a_cluster("a", "b", "c", environment=environment) as nodes:
        serve.start(proxy_location="Disabled")
        yield nodes
        serve.shutdown()


@pytest.fixture(scope="module")
def model(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_tiny_bert(tmp_path_factory.mktemp("tiny"))
    return ModelConfig(name="tiny", source="org/tiny", revision=hub.add("org/tiny", folder))


def ready_at(marker: str | Path) -> float | None:
    """When that copy became ready or was last asked for, in seconds since the epoch; None if it is not there."""
    try:
        return Path(marker).stat().st_mtime
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Witness:
    """What a replica saw: when each node was ready, when it was created itself, and what it then loaded from."""

    nodes_ready_at: list[float | None]
    created_at: float
    ready_when_loaded: bool
    folder: Path

    def came_after_all_nodes(self) -> bool:
        return all(ready is not None and ready <= self.created_at for ready in self.nodes_ready_at)


class Replica:
    async def __init__(self, model: ModelConfig, cache: CacheConfig, markers: Sequence[str], *_: Any) -> None:  # type: ignore[misc]
        nodes, now = [ready_at(marker) for marker in markers], time.time()
        path = await ensure_local(model, cache)
        self.witness = Witness(nodes, now, ready_at(path / READY) is not None, path)
        self.membership = Membership(cache, model, "model", await version_here(path, model, cache))
        await self.membership.enter()

    def __call__(self) -> Witness:
        return self.witness

    async def status(self) -> list[Any]:
        return await cache_status(CACHE)


class Front:
    """Holds the deployments of an application together."""

    def __init__(self, *tiers: Any) -> None:
        self._tiers = tiers

    async def __call__(self) -> list[Any]:
        return [await tier.remote() for tier in self._tiers]

    async def status(self) -> list[Any]:
        return list(await self._tiers[0].status.remote())


def markers_on(nodes: Nodes, model: ModelConfig) -> list[str]:
    return [str(nodes.models(name) / model.name / (model.revision or "") / READY) for name in nodes.names()]


def tier(name: str, model: ModelConfig, nodes: Nodes, resource: str, *more: Any) -> Any:
    deployment = serve.deployment(
        Replica,
        name=name,
        deployment_actors=warmer_actors([model], CACHE),
        ray_actor_options={"num_cpus": 0, "resources": {resource: 1}},
        max_constructor_retry_count=3,
    )
    return deployment.bind(model, CACHE, markers_on(nodes, model), *more)


def application(model: ModelConfig, nodes: Nodes, resources: Sequence[str], version: int = 1) -> Any:
    tiers = [tier(f"on-{resource}", model, nodes, resource, version) for resource in resources]
    return serve.deployment(Front, ray_actor_options={"num_cpus": 0}).bind(*tiers)


def test_no_replica_is_created_before_every_node_is_warm(hub: LocalHub, nodes: Nodes, model: ModelConfig) -> None:
    hub.fail(Fault("model.safetensors", delay_s=3.0))
    handle = serve.run(application(model, nodes, ["a", "b"]), name="gated", route_prefix=None)
    hub.recover()
    on_a, on_b = handle.remote().result()
    given_at = next(seen.at for seen in hub.seen if seen.path.endswith("model.safetensors")) + 3.0
    for witness in (on_a, on_b):
        assert witness.came_after_all_nodes()
        assert len(witness.nodes_ready_at) == 4
        assert witness.created_at > given_at
        assert witness.ready_when_loaded
    assert on_a.folder.is_relative_to(nodes.disk("a"))
    assert on_b.folder.is_relative_to(nodes.disk("b"))
    assert set(hub.downloads().values()) == {1}


def test_a_copy_that_a_replica_uses_is_not_removed(nodes: Nodes, model: ModelConfig) -> None:
    cache = CACHE.model_copy(update={"root": str(nodes.models("a"))})
    manifest = NodeCache(cache).find(model)
    assert manifest is not None
    crowded = NodeCache(cache.model_copy(update={"max_bytes": manifest.total_bytes * 3 // 2}))  # room for one
    with pytest.raises(DiskFullError, match="no copy that is not in use is left"):
        crowded.begin(replace(manifest, name="other"))
    assert ready_at(nodes.models("a") / model.name / manifest.revision / READY) is not None


def named(part: str) -> list[dict[str, str]]:
    """Actors whose name contains this."""
    return [actor for actor in list_named_actors(all_namespaces=True) if part in actor["name"]]


def test_all_applications_with_one_cache_share_one_warmer(nodes: Nodes, model: ModelConfig) -> None:
    serve.run(application(model, nodes, ["c"]), name="second", route_prefix=None)
    assert [actor["name"] for actor in named("warmer::")] == [warmer_name(APPLICATIONS, CACHE)]
    serve.delete("second")
    wait_until(lambda: not named("second"))
    assert len(named("warmer::")) == 1, "the other application still uses it"


def test_gates_end_when_they_are_through(nodes: Nodes) -> None:
    wait_until(lambda: not named("warm-gate"))
    time.sleep(LONGER_THAN_SERVE_WAITS_S)
    assert not named("warm-gate")
    assert serve.status().applications["gated"].status == "RUNNING"


def test_every_node_is_seen_as_ready(nodes: Nodes, model: ModelConfig) -> None:
    status = serve.get_app_handle("gated").status.remote().result()
    assert {(s.model, s.revision, s.phase) for s in status} == {("tiny", model.revision, "ready")}
    assert len(status) == 4


def test_a_new_code_version_asks_the_hub_nothing(hub: LocalHub, nodes: Nodes, model: ModelConfig) -> None:
    hub.seen.clear()
    handle = serve.run(application(model, nodes, ["a", "b"], version=2), name="gated", route_prefix=None)
    assert all(seen.came_after_all_nodes() and seen.ready_when_loaded for seen in handle.remote().result())
    assert hub.seen == []


def test_a_node_that_joins_later_is_warm_before_its_replica_loads(
    hub: LocalHub, nodes: Nodes, model: ModelConfig
) -> None:
    hub.seen.clear()
    serve._run(application(model, nodes, ["a", "late"], version=2), name="gated", route_prefix=None, _blocking=False)
    time.sleep(5)
    nodes.add("late")
    wait_until(lambda: serve.status().applications["gated"].status == "RUNNING")
    _, late = serve.get_app_handle("gated").remote().result()
    assert late.ready_when_loaded
    assert late.folder.is_relative_to(nodes.disk("late"))
    assert hub.seen == []


def test_a_node_that_joins_is_warm_without_any_replica(hub: LocalHub, nodes: Nodes, model: ModelConfig) -> None:
    hub.seen.clear()
    nodes.add("spare")
    wait_until(lambda: Path(markers_on(nodes, model)[-1]).exists())
    assert hub.downloads() == {}


def test_a_warmer_that_was_killed_is_made_again_and_knows_all_nodes(nodes: Nodes) -> None:
    (warmer,) = named("warmer::applications")
    ray.kill(ray.get_actor(**warmer))
    handle = serve.get_app_handle("gated")
    wait_until(lambda: [s.phase for s in handle.status.remote().result()] == ["ready"] * len(nodes.names()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": "org/missing"}, "the Hub has no such model"),
        ({"revision": "0" * 40}, "org/tiny has no commit"),
        ({"source": "package:no_such_package/model", "revision": None}, "no Python package"),
    ],
    ids=["repository", "commit", "package"],
)
def test_what_can_never_work_is_told_at_once(
    hub: LocalHub, nodes: Nodes, model: ModelConfig, change: dict[str, Any], reason: str
) -> None:
    wrong = model.model_copy(update=change)
    serve._run(application(wrong, nodes, ["a"]), name="wrong", route_prefix=None, _blocking=False)
    wait_until(lambda: reason in serve.status().applications["wrong"].deployments["on-a"].message)
    assert serve.status().applications["wrong"].status == "DEPLOYING"
    serve.delete("wrong")


def test_a_deploy_that_the_hub_refuses_fails_and_says_what_to_do(
    hub: LocalHub, nodes: Nodes, model: ModelConfig
) -> None:
    hub.required_token = "another"
    refused = model.model_copy(update={"name": "refused"})
    with pytest.raises(RuntimeError):
        serve.run(application(refused, nodes, ["a"]), name="wrong", route_prefix=None)
    hub.required_token = CANARY
    status = serve.status().applications["wrong"].deployments["on-a"]
    assert status.status == "DEPLOY_FAILED"
    assert "the HF_TOKEN set here is not valid" in status.message
    assert CANARY not in status.message
    serve.delete("wrong")


def test_nothing_of_an_application_is_left_when_it_is_deleted(nodes: Nodes) -> None:
    serve.delete("gated")
    wait_until(lambda: not named("gated"))
    wait_until(lambda: not named("warmer::"))


def test_the_true_application_is_warm_and_its_replicas_write_nothing(
    hub: LocalHub, nodes: Nodes, model: ModelConfig
) -> None:
    hub.seen.clear()
    true = model.model_copy(update={"name": "true"})
    arguments = {"model": true.model_dump(mode="json"), "cache": CACHE.model_dump(mode="json")}
    serve.run(build_model(arguments), name="true", route_prefix=None)  # type: ignore[arg-type]
    assert set(hub.downloads().values()) == {1}
    folder = nodes.models("a") / "true" / str(model.revision)
    version = version_of(folder, true, is_pinned=True)
    tokenizer = serve.get_deployment_handle("true-tokenizer", "true")
    card = tokenizer.card.remote(VersionCall(version.fingerprint)).result()
    assert card.revision == version.revision == model.revision
    with pytest.raises(VersionGoneError):
        tokenizer.card.remote(VersionCall("another")).result()
    (gate,) = [actor["name"] for actor in named("warm-gate") if "true" in actor["name"]]
    assert "true-model" in gate
    leases = [path.name for name in nodes.names() for path in (nodes.models(name) / ".leases").glob("true@*")]
    assert len(leases) == 2
    assert [list(nodes.disk(name).rglob(".hf-home")) for name in nodes.names()] == [[]] * len(nodes.names())


def test_the_token_is_in_no_log_no_file_no_configuration_and_no_metric(nodes: Nodes) -> None:
    details = _get_global_client().get_serve_details()
    assert "true" in details["applications"]
    assert CANARY not in repr(details) + repr(serve.status())
    assert CANARY not in metrics_of_all_nodes()
    assert files_with(CANARY, Path(os.environ["RAY_TMPDIR"])) == []
    serve.delete("true")

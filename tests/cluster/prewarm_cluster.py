"""Several Ray nodes on this machine, each with its own address and its own disk."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 << 20
NOTICE_LOSS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}
"""Ray's defaults notice a node that lost power after a minute and more."""
ROOT = "$TEST_NODE_DISK/models"
"""`cache.root` in these tests: another folder on every node."""


class Nodes:
    """The nodes of a cluster by name; the first is the head and has no CPU."""

    def __init__(self, disks: Path, environment: dict[str, str]) -> None:
        self._disks = disks
        self._environment = environment
        self._nodes: dict[str, Any] = {}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": NOTICE_LOSS, **self._options("head")}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes["head"] = self._cluster.head_node

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _options(self, name: str) -> dict[str, Any]:
        self.disk(name).mkdir(parents=True)
        environment = {**self._environment, "TEST_NODE_DISK": str(self.disk(name))}
        return {"env_vars": environment, "object_store_memory": OBJECT_STORE_BYTES}

    def disk(self, name: str) -> Path:
        return self._disks / name

    def models(self, name: str) -> Path:
        """Where `cache.root` is on that node."""
        return self.disk(name) / "models"

    def add(self, *names: str) -> None:
        for name in names:
            number = len(self._nodes) + 1
            self._nodes[name] = self._cluster.add_node(
                num_cpus=2, resources={name: 10}, node_ip_address=f"127.0.0.{number}", **self._options(name)
            )

    def remove(self, name: str) -> None:
        """As a machine that loses power: no process gets to say goodbye."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def node_id(self, name: str) -> str:
        return str(self._nodes[name].node_id)

    def names(self) -> list[str]:
        return list(self._nodes)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes_of_a_cluster(*names: str, environment: dict[str, str] | None = None) -> Iterator[Nodes]:
    """A cluster of a head and the named nodes, with this process connected to it."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])))
        nodes = Nodes(Path(folder) / "disks", environment or {})
        try:
            nodes.add(*names)
            ray.init(address=nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.close()


def files_with(text: str, folder: Path) -> list[Path]:
    """Files below `folder` (Ray's logs, configuration and all nodes' disks are) that contain `text`."""
    written = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 20
    return [path for path in written if text.encode() in path.read_bytes()]


def metrics_of_all_nodes() -> str:
    """What Prometheus would read."""
    pages = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]
    return "".join(httpx.get(f"http://{address}:{port}/metrics", timeout=10).text for address, port in pages)


def wait_until(true: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)

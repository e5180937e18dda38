from __future__ import annotations

import copy
import os
import subprocess
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.session import Session
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
RAW: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))
TYPES: dict[str, Any] = RAW["available_node_types"]
WORKERS = sorted(set(TYPES) - {RAW["head_node_type"]})


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """What `ray up` makes of the file, defaults filled in."""
    config: dict[str, Any] = prepare_config(copy.deepcopy(RAW))
    return config


def test_rays_own_validator_accepts_the_file(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_the_validator_refuses_a_misspelled_key(prepared: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**prepared, "max_worker": 2})


@pytest.mark.parametrize("name", sorted(TYPES))
def test_ec2_accepts_each_machine(name: str) -> None:
    """Ray passes `node_config` on as it is; EC2's own model of the request knows its keys and types."""
    client = Session().create_client(
        "ec2", RAW["provider"]["region"], aws_access_key_id="none", aws_secret_access_key="none"
    )
    shape = client.meta.service_model.operation_model("RunInstances").input_shape

    report = ParamValidator().validate({**TYPES[name]["node_config"], "MinCount": 1, "MaxCount": 1}, shape)

    assert not report.has_errors(), report.generate_report()


def test_nothing_is_served_on_the_head() -> None:
    assert TYPES[RAW["head_node_type"]]["resources"] == {"CPU": 0}


def test_workers_are_on_demand_unless_they_say_spot() -> None:
    spot = {name for name in WORKERS if "InstanceMarketOptions" in TYPES[name]["node_config"]}

    assert spot == {"gpu-spot"}
    assert TYPES["gpu-spot"]["priority"] < TYPES["gpu"]["priority"]


def test_only_a_model_replica_fits_on_a_gpu_node() -> None:
    for name in ("gpu", "gpu-spot"):
        resources = TYPES[name]["resources"]
        assert resources["CPU"] == resources["GPU"]


def test_the_machine_image_is_chosen_here_and_not_by_rays_old_default() -> None:
    assert all("ubuntu-24.04" in node["node_config"]["ImageId"] for node in TYPES.values())


def fits(options: dict[str, Any], resources: dict[str, int]) -> bool:
    needed = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return all(resources.get(name, 0) >= amount for name, amount in needed.items())


def deployments() -> list[Any]:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8"))
    return [entry for application in config["applications"] for entry in application["deployments"]]


@pytest.mark.parametrize("entry", deployments(), ids=lambda entry: entry["name"])
def test_every_deployment_fits_on_a_worker(entry: dict[str, Any]) -> None:
    """Or its replicas would be pending for ever, and the autoscaler would start nothing."""
    assert any(fits(entry.get("ray_actor_options", {}), TYPES[name]["resources"]) for name in WORKERS)


def test_a_model_replica_with_a_gpu_fits_on_a_worker() -> None:
    gpu = {"num_cpus": 1, "num_gpus": 1}

    assert [name for name in WORKERS if fits(gpu, TYPES[name]["resources"])] == ["gpu", "gpu-spot"]


def test_every_package_is_installed_under_the_constraints(prepared: dict[str, Any]) -> None:
    """The default setup would install a nightly wheel of Ray."""
    commands = prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    installs = [command for command in commands if "pip" in command and "install" in command and "apt" not in command]

    assert installs
    assert all("-c" in command and "constraints.txt" in command for command in installs)
    assert not any("http" in command or "-U" in command for command in commands)


def test_constraints_pin_everything_that_the_project_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {Requirement(line).name for line in lines if not line.startswith("#")}
    asked = {Requirement(line).name.lower().replace("_", "-") for line in requires("serve-app") or ()}

    assert asked - pinned == {"serve-app"}


def test_everything_that_is_mounted_is_there() -> None:
    mounted = {source for source in RAW["file_mounts"].values() if not source.startswith("~")}

    assert all((ROOT / source).exists() for source in mounted)
    assert {"serve_app", "constraints.txt", "pyproject.toml"} <= mounted


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_asks_for_the_token_everywhere(commands: str) -> None:
    started = [command for command in RAW[commands] if "ray" in command and " start " in command]

    assert started
    assert all("RAY_AUTH_MODE=token" in command for command in started)
    assert all('RAY_SERVE_HAPROXY_BINARY_PATH="$HOME/venv/bin/serve-app-haproxy"' in command for command in started)


def test_the_dashboard_is_on_loopback() -> None:
    (start,) = (command for command in RAW["head_start_ray_commands"] if "--head" in command)

    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_enable_autoscaler_v2=1" in start  # the first one does not know `priority`


def test_shell_commands_are_well_formed(prepared: dict[str, Any]) -> None:
    for key in prepared:
        for command in prepared[key] if key.endswith("_commands") else ():
            subprocess.run(["bash", "-n", "-c", command], check=True)


class Node:
    """A machine as the initialization commands see it: stand-ins for what needs a disk or root."""

    def __init__(self, root: Path, disk: str | None, image_mounts: bool = False) -> None:
        self.root, self.home = root, root / "home"
        self.home.mkdir()
        (self.home / ".ray").mkdir()
        (self.home / ".ray" / "auth_token").write_text("secret")
        (root / "bin").mkdir()
        self.log = root / "log"
        self.log.touch()
        image_mounted = str(root / "opt/dlami/nvme") if image_mounts else "nowhere"
        self.program("sudo", '"$@"')
        self.program("mountpoint", f'[ "$2" = {image_mounted} ] || grep -q "mount .* $2$" {self.log}')
        self.program(
            "lsblk", f'case "$*" in *FSTYPE*) grep -q mkfs {self.log} && echo ext4;; *) echo {disk or ""};; esac'
        )
        for name in ("mkfs.ext4", "mount"):
            self.program(name, f'echo "{name} $*" >> {self.log}')

    def program(self, name: str, body: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def initialize(self) -> None:
        for command in RAW["initialization_commands"]:
            local = command.replace("/mnt/nvme", f"{self.root}/mnt/nvme").replace(
                "/opt/dlami", f"{self.root}/opt/dlami"
            )
            environment = {"PATH": f"{self.root}/bin:{os.environ['PATH']}", "HOME": str(self.home)}
            subprocess.run(["bash", "-c", local], check=True, env=environment)

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "serve_app"

    def count(self, program: str) -> int:
        return sum(line.startswith(program) for line in self.log.read_text().splitlines())


DISK = '"/dev/nvme1n1 Amazon EC2 NVMe Instance Storage"'


def test_the_local_disk_is_formatted_and_mounted_once(tmp_path: Path) -> None:
    node = Node(tmp_path, DISK)

    node.initialize()
    (node.cache / "models").mkdir()
    node.initialize()

    assert node.cache.resolve() == tmp_path / "mnt/nvme/serve_app"
    assert (node.cache / "models").is_dir()
    assert (node.count("mkfs.ext4"), node.count("mount")) == (1, 1)


def test_a_formatted_disk_is_mounted_again_after_a_reboot_and_not_formatted(tmp_path: Path) -> None:
    node = Node(tmp_path, DISK)
    node.initialize()
    (node.cache / "models").mkdir()

    node.log.write_text("mkfs.ext4 before the reboot\n")
    node.initialize()

    assert (node.count("mkfs.ext4"), node.count("mount")) == (1, 1)
    assert (node.cache / "models").is_dir()


def test_a_disk_that_the_image_has_mounted_is_used_as_it_is(tmp_path: Path) -> None:
    node = Node(tmp_path, DISK, image_mounts=True)

    node.initialize()

    assert node.cache.resolve() == tmp_path / "opt/dlami/nvme/serve_app"
    assert node.count("mkfs.ext4") == 0


def test_without_a_local_disk_the_cache_is_a_plain_folder(tmp_path: Path) -> None:
    node = Node(tmp_path, disk=None)

    node.initialize()
    node.initialize()

    assert node.cache.is_dir()
    assert not node.cache.is_symlink()
    assert node.count("mkfs.ext4") == 0


def test_only_its_owner_can_read_the_token(tmp_path: Path) -> None:
    node = Node(tmp_path, disk=None)

    node.initialize()

    assert (node.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600

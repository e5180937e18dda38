from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.session import Session
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.cli import haproxy
from serve_app.cli.environment import haproxy_files

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


def test_constraints_pin_everything_that_the_project_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {Requirement(line).name for line in lines if not line.startswith("#")}
    asked = {Requirement(line).name.lower().replace("_", "-") for line in requires("serve-app") or ()}

    assert asked - pinned == {"serve-app"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every installed package but this one, so that pip finds what the project depends on and downloads nothing."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "serve_app" not in entry.name:
            (folder / entry.name).symlink_to(entry)
    return folder


class Machine:
    """A home that has what `ray up` copies there and nothing else, in which the commands of cluster.yaml are run."""

    def __init__(self, root: Path, packages: Path) -> None:
        self.home, self.programs, self.packages = root / "home", root / "bin", packages
        self.programs.mkdir()
        (self.programs / "python3").symlink_to(sys.executable)
        (self.programs / "dpkg").symlink_to("/bin/true")  # python3-venv is there
        for target, source in RAW["file_mounts"].items():
            mount(source, Path(self.local(target)))

    def local(self, text: str) -> str:
        return text.replace("/home/ubuntu", str(self.home))

    def run(self, command: str, **environment: str) -> str:
        """What a command prints, in a shell that knows this home only and from which nothing can be downloaded."""
        own = {
            "HOME": str(self.home),
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(self.packages),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # this is how pip wants to be told that there is none
        }
        shell = ["bash", "-c", self.local(command)]
        done = subprocess.run(shell, cwd=self.home, env=own | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


def mount(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.startswith("~"):
        target.write_text("something of whoever runs `ray up`")
    elif (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns(*RAW["rsync_exclude"]))
    else:
        shutil.copy(ROOT / source, target)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, packages: Path, prepared: dict[str, Any]) -> Machine:
    """One that has been set up as `ray up` sets up the head."""
    machine = Machine(tmp_path_factory.mktemp("machine"), packages)
    for command in prepared["head_setup_commands"]:
        machine.run(command)
    return machine


def test_the_package_is_installed_from_what_is_mounted(machine: Machine) -> None:
    printed = machine.run('"$HOME/venv/bin/python" -c "import serve_app; print(serve_app.__file__)"')

    assert Path(printed.strip()).parent == machine.home / "serve-app" / "serve_app"


def test_whoever_logs_in_finds_the_commands_and_uses_the_token(machine: Machine) -> None:
    printed = machine.run('. ~/.bashrc; echo "$RAY_AUTH_MODE"; command -v serve-app; serve-app --help')

    assert printed.splitlines()[:2] == ["token", f"{machine.home}/venv/bin/serve-app"]
    assert "check a serve_config.yaml" in printed


def test_setting_up_a_second_time_changes_nothing(machine: Machine, prepared: dict[str, Any]) -> None:
    before = (machine.home / ".bashrc").read_text()
    for command in prepared["worker_setup_commands"]:
        machine.run(command)

    assert (machine.home / ".bashrc").read_text() == before


def test_the_installed_command_checks_the_default_file(machine: Machine) -> None:
    shutil.copy(ROOT / "serve_config.yaml", machine.home)

    assert "serve_config.yaml: no errors" in machine.run('"$HOME/venv/bin/serve-app" check')


def test_every_install_keeps_to_the_constraints(machine: Machine) -> None:
    """If they ask for a torch that there is not, none goes through."""
    constraints = machine.home / "serve-app" / "constraints.txt"
    told = constraints.read_text()
    constraints.write_text(re.sub(r"^torch==.*$", "torch==0.0.1", told, flags=re.MULTILINE))
    installs = [command for command in RAW["setup_commands"] if command.startswith('"$HOME/venv/bin/pip" install')]
    try:
        for command in installs:
            with pytest.raises(AssertionError, match=r"conflicting dependencies|No matching distribution"):
                machine.run(command)
    finally:
        constraints.write_text(told)
    assert len(installs) == 2


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_is_started_with_the_token_and_with_a_haproxy_that_is_there(
    machine: Machine, short_home: Path, commands: str
) -> None:
    """`ray` itself is a stand-in, which repeats what it was started with."""
    ray = machine.home / "venv" / "bin" / "ray"
    ray.write_text('#!/bin/sh\necho "$*"\nenv\n')
    ray.chmod(0o755)
    environment = {"RAY_HEAD_IP": "10.0.0.1", "HOME": str(short_home)}
    try:
        stop, start = (machine.run(command, **environment).splitlines() for command in RAW[commands])
    finally:
        ray.unlink()

    assert stop[0] == "stop"
    assert start[0].startswith("start ")
    told = dict(line.split("=", 1) for line in start[1:] if "=" in line)
    assert told["RAY_AUTH_MODE"] == "token"
    binary, folder = told[haproxy.VARIABLE], short_home / ".haproxy"
    assert binary == f"{machine.home}/venv/bin/serve-app-haproxy"
    assert Path(binary).read_bytes() == (ROOT / "deploy" / "serve-app-haproxy").read_bytes()
    assert os.access(binary, os.X_OK)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {name: told[name] for name in haproxy_files(folder)} == {
        name: path.removesuffix("/") for name, path in haproxy_files(folder).items()
    }


@pytest.fixture
def short_home(machine: Machine) -> Iterator[Path]:
    """The home by a path that is as short as that of a real one: HAProxy's sockets are put below it."""
    folder = Path(tempfile.mkdtemp(prefix="sa-"))
    (folder / "h").symlink_to(machine.home)
    yield folder / "h"
    shutil.rmtree(folder)


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

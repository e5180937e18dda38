"""Where `serve-app-haproxy` is, HAProxy that tells of clients which leave: see deploy/serve-app-haproxy."""

from __future__ import annotations

import sys
from pathlib import Path

VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Ray Serve runs what it names."""


def command_path() -> Path | None:
    """The command of this installation; None if it is run without being installed."""
    path = Path(sys.executable).with_name("serve-app-haproxy")
    return path if path.is_file() else None

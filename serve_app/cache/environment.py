"""Environment variables: of replicas, of the process that downloads, and those that no longer do anything."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from serve_app.config import CacheConfig

logger = logging.getLogger(__name__)

_REPLICA_MARK = "SERVE_APP_REPLICA"
"""Set where HF_HUB_OFFLINE is ours, for a replica, and not the operator's wish."""


def replica_environment(cache: CacheConfig) -> dict[str, str]:
    """Environment of a replica: the Hub is off, and nothing of it is looked for outside the cache.

    To be set before huggingface_hub is imported. The Hub's token is not for replicas.
    """
    home = os.path.join(cache.root, ".hf-home")
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": home,
        "HF_HUB_CACHE": os.path.join(home, "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
        _REPLICA_MARK: "1",
    }


def download_environment(home: Path) -> dict[str, str]:
    """Environment of the process that downloads: ours, but quiet, and nothing is written outside `home`."""
    environment = dict(os.environ)
    if environment.pop(_REPLICA_MARK, None):
        environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        environment.pop("HF_HOME", None)
    xdg = environment.get("XDG_CACHE_HOME", "~/.cache")
    usual_home = environment.get("HF_HOME") or os.path.join(xdg, "huggingface")
    environment.setdefault("HF_TOKEN_PATH", os.path.join(usual_home, "token"))
    return environment | {
        "HF_HOME": str(home / ".hf"),
        "HF_HUB_CACHE": str(home / ".hf" / "hub"),
        "HF_XET_CACHE": str(home / ".hf" / "xet"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def warn_of_dead_settings() -> None:
    """Say so in the log if TRANSFORMERS_CACHE is set, which older guides advise."""
    if os.environ.get("TRANSFORMERS_CACHE"):
        logger.warning(
            "TRANSFORMERS_CACHE is set, but Transformers 5 does not read it. Models lie below `cache.root` of "
            "serve_config.yaml here; for other tools set HF_HOME or HF_HUB_CACHE instead"
        )

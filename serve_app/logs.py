"""Where the log lines of a replica go."""

from __future__ import annotations

import logging
import sys


def show_log(level: int = logging.WARNING) -> None:
    """Write this application's lines of `level` and above to standard error, where `serve run` shows them.

    To the process's own: in throughput mode Serve puts a stream in its place that goes to a file of Serve's, a thousand
    lines at a time. May be called again, and never makes a process say less.
    """
    logger = logging.getLogger("serve_app")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)
    logger.setLevel(min(level, logger.level))

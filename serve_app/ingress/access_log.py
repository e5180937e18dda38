"""One line of JSON a request, for log collectors: what it was, what it cost, how it ended. Never what was in it.

Every value is ours (a route's path, a served model's name, a status), a number, or a request id and key name of
harmless characters; and JSON escapes what would end a line. So nothing that a client sends can make or forge one.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import datetime, timezone
from typing import Any

from serve_app.ingress.encoding import encode
from serve_app.ingress.visit import Visit

logger = logging.getLogger("serve_app.access")

CLIENT_LEFT = 499
"""The status of a request whose client did not wait for it, as in nginx."""


def start_log() -> None:
    """Write lines to standard output, which Ray keeps in a file a worker. May be called again.

    To the process's own: Serve puts a stream in its place that goes to Serve's log, a thousand lines at a time.
    """
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stdout__)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)


def log_request(visit: Visit) -> None:
    logger.info("%s", encode(entry(visit)).decode())


def entry(visit: Visit) -> dict[str, Any]:
    """Times in seconds; null is what is not known, as the model of a request that named none."""
    request, answer = visit.request, visit.answer
    times = None if answer is None else answer.timings
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": visit.id,
        "method": None if visit.route is None else visit.route[0],
        "route": None if visit.route is None else visit.route[1],
        "status": visit.status or CLIENT_LEFT,
        "code": visit.outcome,
        "model": visit.model or None,
        "task": visit.task or None,
        "inputs": request and len(request.inputs),
        "tokens": visit.usage.tokens,
        "total_s": round(time.perf_counter() - visit.started, 6),
        "tokenize_s": times and round(times.tokenize_s, 6),
        "queue_s": times and round(times.queue_s, 6),
        "forward_s": times and round(times.forward_s, 6),
        "key": visit.account and visit.account.key.name,
    }

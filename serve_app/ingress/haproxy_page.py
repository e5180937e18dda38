"""What HAProxy says in its own name: a replica was lost with a request in it, or none is there.

Ray Serve gives HAProxy one file for 502, 503 and 504, which it writes when HAProxy's keeper starts on a node, and which
HAProxy reads whenever Serve makes it load its configuration again, as for each replica that comes or goes. It has no
setting for what is in it. So each ingress replica puts our reply there. It is the same for every path and request, in
the shape of Hugging Face's servers, and its `request_id` is empty.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from serve_app.errors import UnavailableError
from serve_app.ingress.protocols import tei
from serve_app.ingress.refusals import error_reply

logger = logging.getLogger(__name__)

_USUAL_CONFIG = "/tmp/haproxy-serve/haproxy.cfg"
_NAME = "500.http"


def error_page() -> bytes:
    """A whole HTTP reply, as HAProxy's `errorfile` takes one."""
    lost = UnavailableError("the replica that had the request was lost, or none is there; send it again")
    reply = error_reply(lost, tei.DIALECT, "")
    assert isinstance(reply.body, bytes)
    headers = ((b"content-type", reply.content_type), (b"content-length", b"%d" % len(reply.body)), *reply.headers)
    lines = [b"HTTP/1.1 %d Service Unavailable" % reply.status, *(b"%b: %b" % header for header in headers)]
    return b"\r\n".join((*lines, b"", reply.body))


def page_of(node_id: str) -> Path:
    """Where Serve has put its page on a node."""
    config = Path(os.environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", _USUAL_CONFIG))
    return config.parent / node_id / _NAME


def put_error_page(page: Path) -> None:
    """In the place of Serve's; if there is none, because no HAProxy runs on this node, nothing happens.

    Its folder, where by Ray's default HAProxy's admin socket lies too, is closed to other users of the machine.
    `serve-app-haproxy` does that before HAProxy starts; any other HAProxy is open to them until this is called.
    """
    ours = error_page()
    try:
        if page.parent.stat().st_mode & 0o077:
            page.parent.chmod(0o700)
        if page.read_bytes() != ours:
            new = page.with_suffix(f".{os.getpid()}")
            new.write_bytes(ours)
            new.replace(page)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("HAProxy keeps Serve's page for lost replicas: %s", error)

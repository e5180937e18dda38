"""An HTTP server that answers `snapshot_download` as the Hub does, notes every request, and fails on demand."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/?]+)")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/?]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with requests whose path contains `where`, `times` times (then it is over)."""

    where: str
    times: int = 1_000_000
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    """Before the answer's first byte."""
    bytes_per_s: float | None = None
    cut_after: int | None = None
    """Bytes of the body after which the connection is closed."""
    flip_byte: int | None = None
    """Index of a byte of the body that arrives wrong."""
    method: str = "GET"


@dataclass(frozen=True)
class Seen:
    """One request, as the hub saw it."""

    method: str
    path: str
    client: str
    authorization: str | None
    range: str | None
    at: float


class LocalHub:
    """`repositories` maps `<org>/<name>` to commits, and those to the folder with the files."""

    def __init__(self, *, address: str = "127.0.0.1") -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.required_token: str | None = None
        self.seen: list[Seen] = []
        self.bytes_sent = 0
        self.bytes_per_s: float | None = None
        """What all answers together may take, as an uplink or a rate limit does."""
        self._line_free_at = 0.0
        self._faults: list[list[Any]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((address, 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def add(self, repo: str, folder: Path, revision: str | None = None) -> str:
        """Serve `folder` as a commit of `repo`; the 40 hexadecimal digits of that commit."""
        revision = revision or hashlib.sha1(f"{repo}{folder}".encode()).hexdigest()
        self.repositories.setdefault(repo, {})[revision] = folder
        return revision

    def point(self, branch: str, repo: str, revision: str) -> None:
        """The branch of `repo` is that commit now."""
        self.branches[repo, branch] = revision

    def fail(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append([fault, fault.times])

    def recover(self) -> None:
        with self._lock:
            self._faults.clear()

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for entry in self._faults:
                fault: Fault = entry[0]
                if entry[1] > 0 and fault.where in path and fault.method == method:
                    entry[1] -= 1
                    return fault
        return None

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def count_bytes(self, sent: int) -> float:
        """Note what was sent; for how long the sender must now wait, as all senders share one line."""
        with self._lock:
            self.bytes_sent += sent
            if self.bytes_per_s is None:
                return 0.0
            self._line_free_at = max(self._line_free_at, time.monotonic()) + sent / self.bytes_per_s
            return self._line_free_at - time.monotonic()

    def downloads(self) -> Counter[str]:
        """How often each file's content was asked for."""
        matches = (_FILE.fullmatch(seen.path) for seen in self.seen if seen.method == "GET")
        return Counter(match["path"] for match in matches if match is not None)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Answers):
        pass

    Handler.hub = hub
    return Handler


class _Answers(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.note(
            Seen(
                self.command,
                path,
                self.client_address[0],
                self.headers.get("Authorization"),
                self.headers.get("Range"),
                time.time(),
            )
        )
        fault = self.hub.fault_for(self.command, path)
        if fault is not None:
            time.sleep(fault.delay_s)
            if fault.status is not None:
                self._refuse(fault.status, dict(fault.headers))
                return
        if self.hub.required_token and self.headers.get("Authorization") != f"Bearer {self.hub.required_token}":
            self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        self._route(path, fault)

    def _route(self, path: str, fault: Fault | None) -> None:
        for pattern, answer in ((_TREE, self._tree), (_INFO, self._info), (_FILE, self._file)):
            match = pattern.fullmatch(path)
            if match is None:
                continue
            commits = self.hub.repositories.get(match["repo"])
            revision = self._commit(match)
            if commits is None:
                self._refuse(404, {"X-Error-Code": "RepoNotFound"})
            elif revision not in commits:
                self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                answer(match, commits[revision], fault)
            return
        self._refuse(404, {})

    def _commit(self, match: re.Match[str]) -> str:
        return self.hub.branches.get((match["repo"], match["revision"]), match["revision"])

    def _info(self, match: re.Match[str], folder: Path, fault: Fault | None) -> None:
        self._json({"id": match["repo"], "sha": self._commit(match), "siblings": []})

    def _tree(self, match: re.Match[str], folder: Path, fault: Fault | None) -> None:
        self._json([_entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()])

    def _file(self, match: re.Match[str], folder: Path, fault: Fault | None) -> None:
        path = folder / match["path"]
        if not path.is_file():
            self._refuse(404, {"X-Error-Code": "EntryNotFound"})
            return
        body = bytearray(path.read_bytes())
        entry = _entry(path, folder)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        start = _range_start(self.headers.get("Range"))
        if fault is not None and fault.flip_byte is not None:
            body[fault.flip_byte] ^= 0xFF
        headers = {"X-Repo-Commit": match["revision"], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._send(206 if start else 200, headers, bytes(body[start:]), fault)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), None)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._send(status, headers, b"", None)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._write(body, fault)

    def _write(self, body: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.cut_after is not None:
            body = body[: fault.cut_after]
            self.close_connection = True
        for piece, wait_s in _pieces(body, fault.bytes_per_s if fault else None):
            try:
                self.wfile.write(piece)
            except OSError:  # the client has gone
                self.close_connection = True
                return
            time.sleep(max(wait_s, self.hub.count_bytes(len(piece))))

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in `LocalHub.seen`; the test's output stays clean."""


def _pieces(body: bytes, bytes_per_s: float | None) -> Iterator[tuple[bytes, float]]:
    step = 1 << 20 if bytes_per_s is None else max(1, int(bytes_per_s / 20))
    for start in range(0, len(body), step):
        yield body[start : start + step], 0.0 if bytes_per_s is None else 0.05


def _range_start(header: str | None) -> int:
    match = re.fullmatch(r"bytes=(\d+)-\d*", header or "")
    return int(match[1]) if match else 0


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    """As the Hub's listing has it. The Hub knows the hashes of its files, so they are computed once."""
    now = path.stat()
    sha1, sha256 = _hashes(path, now.st_size, now.st_mtime_ns)
    entry: dict[str, Any] = {
        "type": "file",
        "oid": sha1,
        "size": now.st_size,
        "path": path.relative_to(folder).as_posix(),
    }
    if path.suffix in (".safetensors", ".bin", ".onnx"):
        entry["lfs"] = {"oid": sha256, "size": now.st_size, "pointerSize": 130}
    return entry


@functools.lru_cache(maxsize=1000)
def _hashes(path: Path, size: int, modified_ns: int) -> tuple[str, str]:
    """SHA-1 as a git blob, and SHA-256."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


@contextmanager
def local_hub(address: str = "127.0.0.1") -> Iterator[LocalHub]:
    with LocalHub(address=address) as hub:
        yield hub

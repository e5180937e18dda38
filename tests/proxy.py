"""An HTTP proxy that notes what it is asked for, and knows one host of the outside world."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

OUTSIDE = "hub.test"
"""No name server knows it, so that nobody gets there but through the proxy."""


def through_proxy(url: str) -> dict[str, str]:
    """The environment of a machine that reaches the outside world through a proxy, and has no exceptions from that."""
    proxied = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), url)
    return {**proxied, "no_proxy": "", "NO_PROXY": ""}


class Proxy:
    """Forwards requests for `http://hub.test` to `behind`, `<host>:<port>`, and refuses all else."""

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.asked: list[str] = []
        """What was asked for: `<method> <url>`, or `CONNECT <host>:<port>`."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Forwards,), {"proxy": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def asked_of_others(self) -> list[str]:
        return [asked for asked in self.asked if not asked.split(" ", 1)[1].startswith(f"http://{OUTSIDE}/")]

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Forwards(BaseHTTPRequestHandler):
    proxy: Proxy

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def do_CONNECT(self) -> None:
        self._note()
        self.send_error(502)

    def _note(self) -> None:
        self.proxy.asked.append(f"{self.command} {self.path}")

    def _forward(self) -> None:
        self._note()
        url = urlsplit(self.path)
        if url.hostname != OUTSIDE or self.command == "POST":
            self.send_error(502)
            return
        connection = HTTPConnection(self.proxy.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "proxy-connection"}
        connection.request(self.command, f"{url.path}?{url.query}" if url.query else url.path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("date", "server", "connection"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        connection.close()

    def log_message(self, *_: object) -> None:
        pass

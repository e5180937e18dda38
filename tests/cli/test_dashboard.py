"""What is said when the dashboard does not answer as it should; the tests with a cluster ask real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli import main
from serve_app.cli.dashboard import Dashboard, DashboardError
from tests.live import free_port
from tests.proxy import through_proxy

TOKEN = "canary-0123456789"

Answering = Callable[[int, bytes], "Dashboard"]


class Handler(BaseHTTPRequestHandler):
    answer: tuple[int, bytes]
    seen: list[str | None]

    def do_GET(self) -> None:
        type(self).seen.append(self.headers.get("Authorization"))
        status, body = self.answer
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(status: int, body: bytes) -> Iterator[tuple[Dashboard, list[str | None]]]:
    """A dashboard that gives this answer, and the tokens that it is shown."""
    handler = type("Own", (Handler,), {"answer": (status, body), "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Dashboard(f"http://127.0.0.1:{server.server_port}/"), handler.seen  # type: ignore[attr-defined]
        finally:
            server.shutdown()


@pytest.fixture
def answering() -> Iterator[Answering]:
    with ExitStack() as stack:
        yield lambda status, body: stack.enter_context(serving(status, body))[0]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_DASHBOARD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("place", ["home", "path", "variable"])
def test_the_token_is_found_where_ray_looks_for_it(place: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    else:
        file = home / ".ray" / "auth_token" if place == "home" else home / "token"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{TOKEN}\n")
        if place == "path":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with serving(200, b'{"applications": {}}') as (dashboard, seen):
        dashboard.details()
    assert seen == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_not_repeated(
    answering: Answering, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    dashboard = answering(status, b"Forbidden: Invalid authentication token")
    with pytest.raises(DashboardError, match="asks for a token") as raised:
        dashboard.details()
    assert TOKEN not in raised.value.message


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"applications": 1}', b"{}"])
def test_a_server_that_is_no_dashboard_is_told(answering: Answering, body: bytes) -> None:
    with pytest.raises(DashboardError, match="does not answer as a Ray dashboard does"):
        answering(200, body).details()


def test_what_the_dashboard_says_is_wrong_is_repeated(answering: Answering) -> None:
    with pytest.raises(DashboardError, match="answers 503: the GCS may be down"):
        answering(503, b"the GCS may be down").details()


@pytest.mark.parametrize("address", ["", "127.0.0.1:{port}", "ftp://127.0.0.1:{port}"])
def test_an_address_where_there_is_none_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "--address", address.format(port=free_port())]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve-app: no Ray dashboard answers at ")


def test_an_address_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "--address", "http://[::1"]) == 1
    assert capsys.readouterr().err.startswith("serve-app: http://[::1 is no address of a Ray dashboard")


def test_nothing_on_this_machine_is_reached_through_a_proxy(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in through_proxy(f"http://127.0.0.1:{free_port()}").items():
        monkeypatch.setenv(name, value)
    assert answering(200, b'{"applications": {}}').details() == {"applications": {}}


def test_status_of_a_cluster_without_applications(answering: Answering, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = answering(200, b'{"applications": {}}')
    assert main.main(["status", "--address", dashboard.address]) == 1
    assert capsys.readouterr().out == "nothing is deployed\n"

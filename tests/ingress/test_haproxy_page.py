"""HAProxy tells of a lost replica in our words."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from serve_app.ingress.haproxy_page import error_page, page_of, put_error_page


def test_the_page_is_a_whole_reply_in_our_shape() -> None:
    head, _, body = error_page().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = httpx.Headers([tuple(line.split(": ")) for line in lines])  # type: ignore[misc]
    assert first == "HTTP/1.1 503 Service Unavailable"
    assert (headers["content-type"], headers["retry-after"]) == ("application/json", "1")
    assert int(headers["content-length"]) == len(body)
    assert json.loads(body)["code"] == "unavailable"


def test_it_takes_the_place_of_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(tmp_path / "haproxy.cfg"))
    page = page_of("node")
    page.parent.mkdir()
    page.write_bytes(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
    put_error_page(page)
    put_error_page(page)
    assert page.read_bytes() == error_page()
    assert list(page.parent.iterdir()) == [page]


def test_its_folder_is_closed_to_other_users(tmp_path: Path) -> None:
    """Where Serve runs another HAProxy than `serve-app-haproxy`, its admin socket lies there open to all."""
    folder = tmp_path / "node"
    folder.mkdir(mode=0o755)
    (folder / "500.http").write_bytes(error_page())
    put_error_page(folder / "500.http")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_where_no_haproxy_runs_nothing_is_made(tmp_path: Path) -> None:
    put_error_page(tmp_path / "node" / "500.http")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_may_not_be_changed_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = tmp_path / "500.http"
    page.mkdir()
    put_error_page(page)
    assert "keeps Serve's page" in caplog.text


def test_serve_has_its_page_there() -> None:
    """Ray's own code says where; a version that moved it would make the page useless without a word."""
    from ray.serve._private import constants, haproxy

    assert Path(constants.RAY_SERVE_HAPROXY_CONFIG_FILE_LOC).name == "haproxy.cfg"
    source = Path(haproxy.__file__).read_text()
    assert 'os.path.join(config_dir, "500.http")' in source
    assert "os.path.join(d, self._node_id, f)" in source

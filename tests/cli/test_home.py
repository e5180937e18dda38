"""A home for who has none. tests/cluster/test_serve_app_serve.py starts a server as such a user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from serve_app.cli.home import check_token_can_be_kept, settle_home
from serve_app.errors import ConfigError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a home would be made, for a user without an account."""

    def getpwuid(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("HOME", raising=False)
    return tmp_path


def test_who_has_none_gets_one_of_its_own_and_the_same_each_time(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_home()
    home = Path(os.environ["HOME"])
    assert home.parent == temporary
    assert home.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "/no/such/folder")
    settle_home()
    assert Path.home() == home


def test_a_home_that_is_there_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary))
    settle_home()
    assert list(temporary.iterdir()) == []


def test_an_account_has_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", "/no/such/folder")
    settle_home()
    assert os.environ["HOME"] == "/no/such/folder"


@pytest.mark.parametrize("trap", ["link", "open"])
def test_what_somebody_else_has_put_there_is_not_taken(temporary: Path, tmp_path: Path, trap: str) -> None:
    home = temporary / f"serve-app-home-{os.getuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        home.symlink_to(tmp_path / "elsewhere")
    else:
        home.mkdir()
        home.chmod(0o777)
    with pytest.raises(ConfigError, match="set HOME to a folder"):
        settle_home()


def test_where_there_is_no_room_for_it_one_line_says_what_to_set(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(temporary / "no" / "such" / "folder"))
    with pytest.raises(ConfigError, match="set HOME to a folder that this user can write to"):
        settle_home()


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/no/such/folder")


@pytest.mark.usefixtures("no_token")
def test_a_token_that_could_not_be_written_is_told_before_the_start() -> None:
    with pytest.raises(ConfigError, match="/no/such/folder is not a folder that this user can write to: set HOME"):
        check_token_can_be_kept()


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"])
def test_no_token_needs_to_be_written_where(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret")
    values = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    monkeypatch.setenv(name, values.get(name, str(tmp_path)))
    check_token_can_be_kept()

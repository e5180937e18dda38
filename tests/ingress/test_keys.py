"""API keys: read, found, reloaded, and never told to anybody."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import get_args

import pytest

from serve_app.config import ApiKeysConfig, IngressConfig, parse
from serve_app.errors import ConfigError
from serve_app.ingress.keys import LOOK_AGAIN_S, Key, KeyRing, digest_of, new_key, presented_keys, read_keys
from serve_app.types import Priority

HEX = "a" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def line(name: str, secret: str, *options: str) -> str:
    return " ".join([name, f"sha256:{digest_of(secret.encode()).hex()}", *options])


def test_a_list_has_a_key_a_line_comments_and_empty_lines() -> None:
    text = (
        f"# ours\n\nalice sha256:{HEX} # the first\n  bob  sha256:{'b' * 64}  roles=admin,metrics tokens_per_minute=5\n"
    )
    alice, bob = read_keys(text, "list")
    assert alice == Key("alice", bytes.fromhex(HEX))
    assert bob == Key("bob", b"\xbb" * 16 + b"\xbb" * 16, frozenset({"admin", "metrics"}), None, 5)


@pytest.mark.parametrize("roles", [{"inference"}, {"admin", "metrics"}])
def test_a_key_is_read_as_it_was_written(roles: set[str]) -> None:
    for priority in get_args(Priority):
        key = Key("alice", digest_of(b"x"), frozenset(roles), 600, None, priority)  # type: ignore[arg-type]
        assert read_keys(key.line, "list") == (key,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no keys"),
        ("# nothing", "no keys"),
        ("alice", "line 1: after the name"),
        ("alice my-secret-key", "line 1: after the name"),
        (f"alice sha256:{HEX[1:]}", "line 1: after the name"),
        (f"alice sha256:{HEX.upper()}", "line 1: after the name"),
        (f"al/ice sha256:{HEX}", "line 1: a name has"),
        (f"a sha256:{HEX}\na sha256:{HEX}", "line 2: a key of this name"),
        (f"a sha256:{HEX} roles=root", "line 1: roles are inference, metrics, admin"),
        (f"a sha256:{HEX} roles=", "line 1: roles are"),
        (f"a sha256:{HEX} requests_per_minute=0", "line 1: requests_per_minute is"),
        (f"a sha256:{HEX} tokens_per_minute=1e5", "line 1: tokens_per_minute is"),
        (f"a sha256:{HEX} priority=secret", "line 1: priority is interactive or bulk"),
        (f"a sha256:{HEX} my-secret-key", "line 1: options are"),
    ],
)
def test_a_wrong_list_is_told_by_line_and_reason_without_repeating_it(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_keys(text, "list")
    assert caught.value.message.startswith(f"list: {reason}")
    assert "secret" not in caught.value.message


def test_the_configuration_names_a_place() -> None:
    with pytest.raises(ConfigError, match=r"args\.api_keys: name a file"):
        parse(IngressConfig, {"api_keys": {}}, "args")
    assert parse(IngressConfig, {}, "args").api_keys is None


def test_new_keys_differ_and_are_long() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 46


def test_a_key_is_offered_as_bearer_or_in_a_header_of_its_own() -> None:
    assert list(presented_keys({b"authorization": b"Bearer abc"})) == [b"abc"]
    assert list(presented_keys({b"authorization": b"bearer  abc "})) == [b"abc"]
    assert list(presented_keys({b"x-api-key": b"abc"})) == [b"abc"]
    assert list(presented_keys({b"authorization": b"Bearer a", b"x-api-key": b"b"})) == [b"a", b"b"]
    assert list(presented_keys({b"authorization": b"Basic abc"})) == []
    assert list(presented_keys({b"authorization": b"Bearer"})) == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(line("alice", "first"))
    return path


def test_a_changed_file_is_read_again_soon_and_not_on_every_request(file: Path) -> None:
    clock = Clock()
    ring = KeyRing(ApiKeysConfig(file=str(file)), clock)
    assert ring.find(b"first") is not None
    file.write_text(line("alice", "second, longer"))
    assert ring.find(b"first") is not None
    clock.now += LOOK_AGAIN_S
    assert ring.find(b"first") is None
    found = ring.find(b"second, longer")
    assert found is not None
    assert found.name == "alice"


@pytest.mark.parametrize("harm", ["wrong", "empty", "gone", "not UTF-8"])
def test_a_file_that_went_wrong_changes_nothing_and_is_logged_without_its_content(
    file: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    clock = Clock()
    ring = KeyRing(ApiKeysConfig(file=str(file)), clock)
    if harm == "gone":
        os.remove(file)
    else:
        file.write_bytes({"wrong": b"my secret-key", "empty": b"", "not UTF-8": b"\xff\xfe"}[harm])
    clock.now += LOOK_AGAIN_S
    with caplog.at_level(logging.ERROR):
        assert ring.find(b"first") is not None
    assert "stay as they were" in caplog.text
    assert "secret" not in caplog.text


def test_a_missing_file_or_variable_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing(ApiKeysConfig(file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="variable SERVE_APP_NO_SUCH_KEYS: no keys"):
        KeyRing(ApiKeysConfig(environment="SERVE_APP_NO_SUCH_KEYS"))


def test_file_and_variable_together_make_one_list(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", f"{line('bob', 'b')}; {line('carol', 'c')}")
    ring = KeyRing(ApiKeysConfig(file=str(file), environment="KEYS"))
    found = [ring.find(secret) for secret in (b"first", b"b", b"c", b"d", b"")]
    assert [key and key.name for key in found] == ["alice", "bob", "carol", None, None]
    monkeypatch.setenv("KEYS", line("alice", "b"))
    with pytest.raises(ConfigError, match="same name"):
        KeyRing(ApiKeysConfig(file=str(file), environment="KEYS"))

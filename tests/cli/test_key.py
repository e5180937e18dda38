from __future__ import annotations

import pytest

from serve_app.cli.main import main
from serve_app.ingress.keys import digest_of, read_keys


def test_a_new_key_is_printed_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    quotas = ["--requests-per-minute", "600", "--priority", "bulk"]
    assert main(["key", "new", "alice", "--role", "metrics", "--role", "admin", *quotas]) == 0
    _, secret, _, _, line = capsys.readouterr().out.splitlines()
    (key,) = read_keys(line, "list")
    assert (key.name, key.roles, key.requests_per_minute) == ("alice", {"admin", "metrics"}, 600)
    assert key.priority == "bulk"
    assert key.digest == digest_of(secret.encode())


@pytest.mark.parametrize(
    "arguments", [["a b"], ["alice", "--tokens-per-minute", "0"], ["alice", "--tokens-per-minute", "-5"]]
)
def test_a_line_that_could_not_be_read_back_is_not_printed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", "new", *arguments]) == 1
    assert capsys.readouterr().out == ""

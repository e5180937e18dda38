from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from serve_app.cache.hub import Hub, redact, with_retries
from serve_app.cache.manifest import ModelFile
from serve_app.cache.resolve import resolve
from serve_app.config import ModelConfig
from serve_app.errors import CacheError, SourceAccessError, SourceNotFoundError, SourceUnavailableError
from tests.hub.server import Fault, LocalHub

CANARY = "hf_canary0123456789"
LIBRARY_TRIES = 6
"""How often huggingface_hub itself asks a hub that is busy."""


def download(model: ModelConfig, into: Path, timeout_s: float = 60.0) -> None:
    assert model.revision is not None
    hub = Hub(timeout_s)
    hub.download(model.source, model.revision, resolve(model, hub).files, into)


def test_downloads_each_needed_file_once(
    hub: LocalHub, tiny_model: ModelConfig, tiny_bert: Path, tmp_path: Path
) -> None:
    download(tiny_model, tmp_path)
    assert set(hub.downloads()) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.downloads().values()) == {1}
    for path in hub.downloads():
        assert (tmp_path / path).read_bytes() == (tiny_bert / path).read_bytes()


def test_sends_the_token_of_the_environment(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.required_token = CANARY
    monkeypatch.setenv("HF_TOKEN", CANARY)
    download(tiny_model, tmp_path)
    assert {seen.authorization for seen in hub.seen} == {f"Bearer {CANARY}"}
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in content for content in written)


def test_a_token_in_a_file_is_sent_and_stands_in_no_environment(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.required_token = CANARY
    secret = tmp_path / "secret"
    secret.write_text(CANARY)
    monkeypatch.setenv("HF_TOKEN_PATH", str(secret))
    hub.fail(Fault("model.safetensors", times=1, delay_s=2.0))
    thread = in_thread(lambda: download(tiny_model, tmp_path / "into"))
    child = downloader(hub)
    assert CANARY not in repr(child.environ()) + repr(child.cmdline())
    thread.join()
    assert {seen.authorization for seen in hub.seen} == {f"Bearer {CANARY}"}


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # a test that fails must not keep the run from ending
    thread.start()
    return thread


def downloader(hub: LocalHub, number: int = 1) -> psutil.Process:
    """The process that has begun to take the weights, for the `number`th time."""
    while hub.downloads()["model.safetensors"] < number:
        time.sleep(0.02)
    [child] = [child for child in psutil.Process().children() if "hub_process" in " ".join(child.cmdline())]
    return child


@pytest.mark.parametrize(
    ("headers", "advice"),
    [({}, "no HF_TOKEN is set"), ({"X-Error-Code": "GatedRepo"}, "licence must be accepted")],
    ids=["private", "gated"],
)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_what_to_do_and_is_not_retried(
    hub: LocalHub, tiny_model: ModelConfig, status: int, headers: dict[str, str], advice: str
) -> None:
    hub.fail(Fault("/tree/", status=status, headers=headers))
    with pytest.raises(SourceAccessError, match=advice):
        resolve(tiny_model, Hub(60.0))
    assert len(hub.seen) == 1


def test_a_wrong_token_is_called_wrong_and_not_shown(
    hub: LocalHub, tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.required_token = "another"
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(SourceAccessError, match="not valid") as caught:
        resolve(tiny_model, Hub(60.0))
    assert CANARY not in str(caught.value)


def test_unknown_repository_and_commit_are_told_apart(hub: LocalHub, tiny_model: ModelConfig) -> None:
    with pytest.raises(SourceNotFoundError, match="no such model"):
        resolve(tiny_model.model_copy(update={"source": "no/such"}), Hub(60.0))
    with pytest.raises(SourceNotFoundError, match=f"no commit {'0' * 40}"):
        resolve(tiny_model.model_copy(update={"revision": "0" * 40}), Hub(60.0))
    assert len(hub.seen) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path, status: int) -> None:
    hub.fail(Fault("model.safetensors", times=1, status=status, headers={"Retry-After": "0"}))
    download(tiny_model, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_hub_that_is_busy_for_longer_than_its_library_waits_is_asked_again(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail(Fault("model.safetensors", times=LIBRARY_TRIES + 1, status=429, headers={"Retry-After": "0"}))
    download(tiny_model, tmp_path)
    assert hub.downloads()["model.safetensors"] == LIBRARY_TRIES + 2
    assert "the Hub answered 429; trying again in" in caplog.text


def test_the_hub_is_not_asked_before_the_time_that_it_named(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    hub.fail(Fault("model.safetensors", times=1, status=429, headers={"Retry-After": "2"}))
    download(tiny_model, tmp_path)
    first, second = (seen.at for seen in hub.seen if seen.method == "GET" and "model.safetensors" in seen.path)
    assert second - first >= 2


def test_where_the_time_runs_out_the_hubs_last_answer_is_told(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    hub.fail(Fault("model.safetensors", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(SourceUnavailableError, match=r"after 6 s \(cache\.download_timeout_s\).*Rate limited"):
        download(tiny_model, tmp_path, timeout_s=6.0)


@pytest.mark.parametrize(
    ("status", "error"), [(401, SourceAccessError), (403, SourceAccessError), (404, SourceNotFoundError)]
)
def test_a_file_that_is_refused_is_asked_for_once(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path, status: int, error: type[CacheError]
) -> None:
    hub.fail(Fault("model.safetensors", status=status))
    with pytest.raises(error, match=tiny_model.source):
        download(tiny_model, tmp_path)
    assert hub.downloads()["model.safetensors"] == 1


def test_a_download_that_the_system_kills_is_begun_again(
    hub: LocalHub, tiny_model: ModelConfig, tiny_bert: Path, tmp_path: Path
) -> None:
    hub.fail(Fault("model.safetensors", times=1, delay_s=60.0))
    thread = in_thread(lambda: download(tiny_model, tmp_path))
    child = downloader(hub)
    while not all((tmp_path / path).exists() for path in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        time.sleep(0.02)
    child.kill()
    thread.join()
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_bert / "model.safetensors").read_bytes()
    assert hub.downloads()["config.json"] == 1


def test_a_download_that_is_killed_again_and_again_is_an_error(
    hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    hub.fail(Fault("model.safetensors", delay_s=240.0))
    killing = in_thread(lambda: [downloader(hub, number).kill() for number in (1, 2, 3)])
    with pytest.raises(CacheError, match="ended with status -9") as caught:
        download(tiny_model, tmp_path, timeout_s=240.0)  # three processes start within it, on a busy machine too
    killing.join()
    assert not isinstance(caught.value, SourceUnavailableError)


def test_a_file_cut_midway_is_completed(
    hub: LocalHub, tiny_model: ModelConfig, tiny_bert: Path, tmp_path: Path
) -> None:
    hub.fail(Fault("model.safetensors", times=1, cut_after=1000))
    download(tiny_model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_bert / "model.safetensors").read_bytes()


def test_a_slow_hub_is_given_up_at_the_deadline(hub: LocalHub, tiny_model: ModelConfig) -> None:
    hub.fail(Fault("/tree/", delay_s=30.0))
    with pytest.raises(SourceUnavailableError, match="download_timeout_s"):
        resolve(tiny_model, Hub(3.0))


def test_no_hub_at_all_is_unavailable(tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError):
        resolve(tiny_model, Hub(4.0))


def test_an_operators_offline_mode_is_obeyed(
    hub: LocalHub, tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailableError, match="HF_HUB_OFFLINE"):
        resolve(tiny_model, Hub(60.0))
    assert hub.seen == []


def test_offline_by_configuration_asks_nobody(hub: LocalHub, tiny_model: ModelConfig) -> None:
    with pytest.raises(SourceUnavailableError, match=r"cache\.offline"):
        resolve(tiny_model, Hub(60.0, offline=True))
    assert hub.seen == []


def test_a_download_can_be_cancelled(hub: LocalHub, tiny_model: ModelConfig, tmp_path: Path) -> None:
    assert tiny_model.revision is not None
    hub.fail(Fault("model.safetensors", delay_s=60.0))
    download = Hub(60.0)
    threading.Timer(3.0, download.cancel).start()
    with pytest.raises(SourceUnavailableError, match="cancelled"):
        download.download(tiny_model.source, tiny_model.revision, [ModelFile("model.safetensors", 1)], tmp_path)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    random.seed(0)
    return Clock()


def test_waits_grow_with_jitter_and_end_before_the_deadline(clock: Clock) -> None:
    def busy() -> None:
        raise SourceUnavailableError("busy", retry_after_s=0.0)

    with pytest.raises(SourceUnavailableError, match=r"busy; gave up after \d+ attempts"):
        with_retries(busy, 300.0, clock.sleep, clock.time)
    assert clock.now < 300.0
    assert all(wait <= min(30.0, 2.0**n) for n, wait in enumerate(clock.waits))
    assert len(set(clock.waits)) == len(clock.waits)


def test_the_hubs_own_wait_is_kept(clock: Clock) -> None:
    answers = iter([SourceUnavailableError("busy", retry_after_s=40.0)])

    def attempt() -> str:
        for error in answers:
            raise error
        return "there"

    assert with_retries(attempt, 300.0, clock.sleep, clock.time) == "there"
    assert 40.0 <= clock.waits[0] <= 41.0


def test_what_is_final_is_raised_at_once(clock: Clock) -> None:
    def refused() -> None:
        raise SourceAccessError("no")

    with pytest.raises(SourceAccessError):
        with_retries(refused, 300.0, clock.sleep, clock.time)
    assert clock.waits == []


def test_tokens_and_signatures_are_cut_out_of_what_libraries_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    said = f"503 for https://cdn.example/a/b?X-Signature=abc&Expires=1 with {CANARY}"
    assert redact(said) == "503 for https://cdn.example/a/b?*** with ***"

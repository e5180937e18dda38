"""The Hub as a source: listing and downloading, each within one total deadline."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from serve_app import errors
from serve_app.cache.environment import download_environment
from serve_app.cache.manifest import ModelFile
from serve_app.errors import CacheError, SourceUnavailableError

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.cache.hub_process import main; main()"
_BACKOFF_S = (1.0, 30.0)
"""First and longest wait between two attempts."""
_KILLED_LIMIT = 3
"""So often may the process that downloads be killed from outside, as the system does where memory is short."""


class Hub:
    """Talks to the Hub through a short-lived process for each call (see `hub_process`).

    `HF_ENDPOINT`, `HF_TOKEN` and the other variables of huggingface_hub are those of this process's environment.
    """

    def __init__(self, timeout_s: float, *, offline: bool = False) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._offline = offline
        self._cancelled = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._killed = 0

    def list_files(self, repo_id: str, revision: str) -> tuple[ModelFile, ...]:
        """Every file at that commit. Raises SourceNotFoundError, SourceAccessError or SourceUnavailableError."""
        with tempfile.TemporaryDirectory() as home:
            raw = self._call(Path(home), operation="list_files", repo_id=repo_id, revision=revision)
        return tuple(ModelFile(**file) for file in raw)

    def commit_of(self, repo_id: str, revision: str) -> str:
        """The commit, 40 hex digits, that a branch or tag points to now. Raises as `list_files`."""
        with tempfile.TemporaryDirectory() as home:
            return str(self._call(Path(home), operation="commit_of", repo_id=repo_id, revision=revision))

    def download(self, repo_id: str, revision: str, files: Sequence[ModelFile], into: Path) -> None:
        """Put `files` below `into`, unverified. Raises as `list_files`, and DiskFullError."""
        paths = [file.path for file in files]
        self._call(into, operation="download", repo_id=repo_id, revision=revision, paths=paths, into=str(into))

    def cancel(self) -> None:
        """End what is under way, from another thread; the call raises SourceUnavailableError."""
        self._cancelled.set()
        child = self._child
        if child is not None:
            child.kill()

    def _call(self, home: Path, **request: Any) -> Any:
        return with_retries(lambda: self._attempt(home, request), self._deadline, self._cancelled.wait)

    def _attempt(self, home: Path, request: dict[str, Any]) -> Any:
        repo_id = request["repo_id"]
        if self._offline:
            raise SourceUnavailableError(f"{repo_id}: no node has a copy, and cache.offline forbids asking the Hub")
        child = self._start(download_environment(home))
        try:
            output = _converse(child, request, max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise SourceUnavailableError(
                f"{repo_id}: not there after {self._timeout_s:g} s (cache.download_timeout_s){_last_words(child)}"
            ) from None
        finally:
            child.kill()
            child.wait()
        if self._cancelled.is_set():
            raise SourceUnavailableError(f"{repo_id}: the download was cancelled")
        return self._result(repo_id, child, *output)

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True)
        return self._child

    def _result(self, repo_id: str, child: subprocess.Popen[str], output: str, complaints: str) -> Any:
        """What the child answered. Raises the error that it answered, or CacheError if it died before."""
        try:
            answer = json.loads(output.rpartition("\n")[2])
        except ValueError:
            raise self._died(repo_id, child.returncode, complaints) from None
        if "error" in answer:
            raise _from_json(answer["error"])
        return answer["result"]

    def _died(self, repo_id: str, status: int, complaints: str) -> CacheError:
        """Worth another try, a few times, if somebody killed it."""
        tail = redact(" | ".join(complaints.splitlines()[-5:]))
        message = f"{repo_id}: the download process ended with status {status}: {tail}"
        self._killed += status < 0
        if status < 0 and self._killed < _KILLED_LIMIT:
            return SourceUnavailableError(message, retry_after_s=0.0)
        return CacheError(message)


def _converse(child: subprocess.Popen[str], request: dict[str, Any], timeout_s: float) -> tuple[str, str]:
    """Send one request; stdin stays open until the answer is there, as its end tells the child that we have gone."""
    assert child.stdin is not None
    stdin, child.stdin = child.stdin, None
    try:
        with suppress(BrokenPipeError):  # it died at once, and has said why
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        return child.communicate(timeout=timeout_s)
    finally:
        with suppress(BrokenPipeError):
            stdin.close()


def _last_words(child: subprocess.Popen[str]) -> str:
    """What a child that is out of time complained of last: the answers of the Hub that it waited after."""
    child.kill()
    complaints = child.communicate()[1].splitlines()
    return f"; the last it said: {redact(complaints[-1])}" if complaints else ""


def with_retries(
    attempt: Callable[[], ResultT],
    deadline: float,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> ResultT:
    """Call `attempt` until it succeeds, fails for good, or the next wait would pass `deadline`.

    Only errors that say after how long to come back are tried again: after that time and a random part of a wait that
    doubles each time (full jitter), so that many nodes do not come back at once.
    """
    for tries in itertools.count():
        try:
            return attempt()
        except SourceUnavailableError as error:  # noqa: PERF203
            wait_s = _wait_s(error, tries, deadline - clock())
            logger.warning("%s; trying again in %.1f s", error.message, wait_s)
            sleep(wait_s)
    raise AssertionError("itertools.count does not end")


def _wait_s(error: SourceUnavailableError, tries: int, time_left_s: float) -> float:
    """Seconds until the next attempt. Raises the error if there is to be none."""
    if error.retry_after_s is None:
        raise error
    first_s, longest_s = _BACKOFF_S
    wait_s = error.retry_after_s + random.uniform(0, min(longest_s, first_s * 2**tries))
    if wait_s < time_left_s:
        return wait_s
    raise SourceUnavailableError(
        f"{error.message}; gave up after {tries + 1} attempts: the time allowed (cache.download_timeout_s) is over"
    ) from error


def redact(text: str) -> str:
    """`text` without the token and without signatures of URLs, should a library have printed them."""
    token = os.environ.get("HF_TOKEN")
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?***", text.replace(token, "***") if token else text)


def _from_json(raw: dict[str, Any]) -> CacheError:
    error: CacheError = getattr(errors, raw["type"])(redact(raw["message"]), retry_after_s=raw["retry_after_s"])
    return error

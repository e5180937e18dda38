"""The Hub as a source: listing and downloading, each within one total deadline."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from serve_app import errors
from serve_app.cache.environment import download_environment
from serve_app.cache.manifest import ModelFile
from serve_app.errors import CacheError, SourceUnavailableError

ResultT = TypeVar("ResultT")

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.cache.hub_process import main; main()"
_BACKOFF_S = (1.0, 30.0)
"""First and longest wait between two attempts."""


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

    def list_files(self, repo_id: str, revision: str) -> tuple[ModelFile, ...]:
        """Every file at that commit. Raises SourceNotFoundError, SourceAccessError or SourceUnavailableError."""
        with tempfile.TemporaryDirectory() as home:
            raw = self._call(Path(home), operation="list_files", repo_id=repo_id, revision=revision)
        return tuple(ModelFile(**file) for file in raw)

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
        answer = self._ask(request, download_environment(home))
        if self._cancelled.is_set():
            raise SourceUnavailableError(f"{repo_id}: the download was cancelled")
        if answer is None:
            raise SourceUnavailableError(f"{repo_id}: not there after {self._timeout_s:g} s (cache.download_timeout_s)")
        if "error" in answer:
            raise _from_json(answer["error"])
        return answer["result"]

    def _ask(self, request: dict[str, Any], environment: dict[str, str]) -> Any:
        """The child's answer, or None if the time ran out. Raises CacheError if it died."""
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True)
        self._child = child
        try:
            output, complaints = _converse(child, request, max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            child.kill()
            child.wait()
        try:
            return json.loads(output.rpartition("\n")[2])
        except ValueError:
            if self._cancelled.is_set():
                return None
            tail = redact(" | ".join(complaints.splitlines()[-5:]))
            raise CacheError(f"the download process ended with status {child.returncode}: {tail}") from None


def _converse(child: subprocess.Popen[str], request: dict[str, Any], timeout_s: float) -> tuple[str, str]:
    """Send one request; stdin stays open until the answer is there, as its end tells the child that we have gone."""
    assert child.stdin is not None
    stdin, child.stdin = child.stdin, None
    with stdin:
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return child.communicate(timeout=timeout_s)


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
            sleep(_wait_s(error, tries, deadline - clock()))
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
    """`text` without the token, should a library have printed it."""
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "***") if token else text


def _from_json(raw: dict[str, Any]) -> CacheError:
    error: CacheError = getattr(errors, raw["type"])(redact(raw["message"]), retry_after_s=raw["retry_after_s"])
    return error

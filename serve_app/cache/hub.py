"""The Hub as a source: listing and downloading, each within one total deadline."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from serve_app import errors
from serve_app.cache.manifest import ModelFile
from serve_app.errors import CacheError, SourceUnavailableError

ResultT = TypeVar("ResultT")

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.cache.hub_process import main; main()"
REPLICA_MARK = "SERVE_APP_REPLICA"
"""Set where HF_HUB_OFFLINE is ours, for a replica, and not the operator's wish."""

_BACKOFF_S = (1.0, 30.0)
"""First and longest wait between two attempts."""


class Hub:
    """Talks to the Hub through a short-lived process for each call (see `hub_process`).

    `HF_ENDPOINT`, `HF_TOKEN` and the other variables of huggingface_hub are those of this process's environment.
    """

    def __init__(self, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s

    def list_files(self, repo_id: str, revision: str) -> tuple[ModelFile, ...]:
        """Every file at that commit. Raises SourceNotFoundError, SourceAccessError or SourceUnavailableError."""
        with tempfile.TemporaryDirectory() as home:
            raw = self._call(Path(home), operation="list_files", repo_id=repo_id, revision=revision)
        return tuple(ModelFile(**file) for file in raw)

    def download(self, repo_id: str, revision: str, files: Sequence[ModelFile], into: Path) -> None:
        """Put `files` below `into`, unverified. Raises as `list_files`, and DiskFullError."""
        paths = [file.path for file in files]
        self._call(into, operation="download", repo_id=repo_id, revision=revision, paths=paths, into=str(into))

    def _call(self, home: Path, **request: Any) -> Any:
        return with_retries(lambda: self._attempt(home, request), self._deadline)

    def _attempt(self, home: Path, request: dict[str, Any]) -> Any:
        time_left = max(0.0, self._deadline - time.monotonic())
        answer = _ask(request, _environment(home), time_left)
        if answer is None:
            raise SourceUnavailableError(
                f"{request['repo_id']}: not there after {self._timeout_s:g} s (cache.download_timeout_s)"
            )
        if "error" in answer:
            raise _from_json(answer["error"])
        return answer["result"]


def with_retries(
    attempt: Callable[[], ResultT],
    deadline: float,
    sleep: Callable[[float], None] = time.sleep,
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


def _ask(request: dict[str, Any], environment: dict[str, str], timeout_s: float) -> Any:
    """The child's answer, or None if the time ran out. Raises CacheError if it died."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True)
    try:
        # communicate() would close stdin, which tells the child that we have gone.
        assert child.stdin is not None
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        stdin, child.stdin = child.stdin, None
        with stdin:
            output, complaints = child.communicate(timeout=timeout_s)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        return None
    finally:
        child.kill()
        child.wait()
    try:
        return json.loads(output.rpartition("\n")[2])
    except ValueError:
        tail = redact("\n".join(complaints.splitlines()[-5:]), environment)
        raise CacheError(f"the download process ended with status {child.returncode}: {tail}") from None


def _environment(home: Path) -> dict[str, str]:
    """Ours, with the Hub on, quiet, and nothing written outside `home`."""
    environment = dict(os.environ)
    real_home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    environment.setdefault("HF_TOKEN_PATH", os.path.join(real_home, "token"))
    environment |= {
        "HF_HOME": str(home / ".hf"),
        "HF_HUB_CACHE": str(home / ".hf" / "hub"),
        "HF_XET_CACHE": str(home / ".hf" / "xet"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if REPLICA_MARK in environment:
        environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return environment


def redact(text: str, environment: dict[str, str]) -> str:
    """`text` without the token, should a library have printed it."""
    token = environment.get("HF_TOKEN")
    return text.replace(token, "***") if token else text


def _from_json(raw: dict[str, Any]) -> CacheError:
    error: CacheError = getattr(errors, raw["type"])(
        redact(raw["message"], dict(os.environ)), retry_after_s=raw["retry_after_s"]
    )
    return error

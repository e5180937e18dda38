"""The process that talks to the Hub: one request as JSON on stdin, one answer as JSON on the last line of stdout.

A process of its own, because only so can a download be stopped at its deadline, the token stay out of every other
process, and huggingface_hub (which reads its settings at import) be online while replicas are offline.
It ends when its stdin is closed, so that it never outlives the one who asked.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from serve_app.errors import (
    CacheError,
    DiskFullError,
    ServeAppError,
    SourceAccessError,
    SourceNotFoundError,
    SourceUnavailableError,
)

_TRANSIENT_STATUSES = frozenset({408, 425, 429})


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer: dict[str, Any] = {"result": _OPERATIONS[request.pop("operation")](**request)}
    except Exception as error:
        answer = {"error": _to_json(explain(error, request["repo_id"], request["revision"]))}
    sys.stdout.write("\n" + json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # threads of an interrupted download must not hold the process


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def commit_of(repo_id: str, revision: str) -> str | None:
    """The commit that a branch or tag points to."""
    return HfApi().model_info(repo_id, revision=revision).sha


def list_files(repo_id: str, revision: str) -> list[dict[str, Any]]:
    """Every file of the repository at that commit, with what the Hub knows of its content."""
    entries = HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)
    return [
        {
            "path": entry.path,
            "size": entry.lfs.size if entry.lfs else entry.size,
            "sha256": entry.lfs.sha256 if entry.lfs else None,
            "git_blob": None if entry.lfs else entry.blob_id,
        }
        for entry in entries
        if isinstance(entry, RepoFile)
    ]


def download(repo_id: str, revision: str, paths: list[str], into: str) -> None:
    """Put exactly `paths` below `into`; files that are there already from an earlier attempt are kept."""
    patterns = [glob.escape(path) for path in paths]
    snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_dir=into)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "commit_of": commit_of,
    "list_files": list_files,
    "download": download,
}


def explain(error: BaseException, repo_id: str, revision: str) -> CacheError:
    """What that exception means to the operator, as one of our errors."""
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            return SourceUnavailableError(
                f"{repo_id}: this node has no copy, and the Hub is switched off (HF_HUB_OFFLINE or cache.offline). "
                "Warm the cache while online, or allow the Hub"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFullError(f"{repo_id}: the disk ran full during the download ({cause.strerror})")
        if isinstance(cause, HfHubHTTPError):
            return _explain_status(cause, repo_id, revision)
    for cause in causes:
        if _is_network_error(cause):
            return _unavailable(f"{repo_id}: the Hub did not answer ({type(cause).__name__}: {cause})")
    return CacheError(f"{repo_id}@{revision}: {type(error).__name__}: {error}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_status(error: HfHubHTTPError, repo_id: str, revision: str) -> CacheError:
    status = error.response.status_code
    headers = error.response.headers
    if status in (401, 403):
        return SourceAccessError(_access_message(status, headers.get("X-Error-Code", ""), repo_id))
    if headers.get("X-Error-Code") == "RevisionNotFound":
        return SourceNotFoundError(f"{repo_id} has no commit {revision}; check `revision`")
    if status == 404:
        return SourceNotFoundError(f"{repo_id}@{revision}: the Hub has no such model (404); check `source`")
    if status in _TRANSIENT_STATUSES or status >= 500:
        return _unavailable(f"{repo_id}: the Hub answered {status}", _seconds(headers.get("Retry-After")))
    return CacheError(f"{repo_id}@{revision}: the Hub answered {status}: {error.server_message or ''}")


def _access_message(status: int, code: str, repo_id: str) -> str:
    if code == "GatedRepo":
        what = "its licence must be accepted first on its page, with the account that HF_TOKEN belongs to"
    elif get_token():
        what = "the HF_TOKEN set here is not valid, or may not read it"
    else:
        what = "it is private, gated or does not exist, and no HF_TOKEN is set where the download runs"
    return (
        f"{repo_id}: the Hub refused access ({status}): {what}. Set HF_TOKEN in the environment of the cluster's nodes "
        "(never in the Serve configuration)"
    )


def _is_network_error(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"TransportError", "TimeoutException", "ConnectionError", "TimeoutError", "RemoteProtocolError"}:
        return True
    return "Consistency check failed" in str(error)  # huggingface_hub: the answer ended early


def _unavailable(message: str, retry_after_s: float | None = None) -> SourceUnavailableError:
    """An error worth another try: those carry `retry_after_s`, 0 where the Hub did not say how long."""
    return SourceUnavailableError(message, retry_after_s=retry_after_s or 0.0)


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:
        return None  # a date: the usual back-off does


def _to_json(error: ServeAppError) -> dict[str, Any]:
    message = error.message.replace(get_token() or "\0", "***")  # should a library have quoted it
    return {"type": type(error).__name__, "message": message, "retry_after_s": error.retry_after_s}

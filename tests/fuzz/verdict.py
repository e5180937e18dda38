"""What may be answered."""

from __future__ import annotations

import re
from typing import Any

import jsonschema

from tests.equality.matrix import assert_same
from tests.fuzz.requests import Fuzzed
from tests.fuzz.schemas import Schema
from tests.fuzz.wire import Answer

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OF_ONE_ANSWER = ("id", "created", "request_id")


class Verdict:
    """Knows how the document says that errors look."""

    def __init__(self, document: Schema) -> None:
        components = document["components"]
        names = ("ErrorBody", "TEIErrorBody", "OpenAIErrorBody", "OpenInferenceError")
        shapes = [{"$ref": f"#/components/schemas/{name}"} for name in names]
        self._error = jsonschema.Draft202012Validator({"anyOf": shapes, "components": components})
        self._statuses = {
            (method.upper(), path): {int(status) for status in operation["responses"]}
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }

    def faults(self, request: Fuzzed, answer: Answer | None) -> list[str]:
        """What is wrong with the answer, in words."""
        if answer is None:
            return [] if request.broken else ["no answer"]
        found = []
        if answer.status >= 500 and not _meant(request, answer.status):
            found.append(f"status {answer.status}")
        if answer.status < 400 or request.wants_head_only:
            return found
        told = answer.body.lower() + repr(answer.headers).lower().encode()
        if request.canary.lower().encode() in told:
            found.append("the input is in the error")
        if not request.broken:
            found += self._misshapen(request, answer)
        return found

    def _misshapen(self, request: Fuzzed, answer: Answer) -> list[str]:
        ids = [value for name, value in answer.headers if name == "x-request-id"]
        found = [] if len(ids) == 1 and _ID.fullmatch(ids[0]) else [f"request ids {ids}"]
        if answer.header("content-type") != "application/json":
            return [*found, f"an error of type {answer.header('content-type')!r}"]
        try:
            error = answer.json()
        except ValueError:
            return [*found, "an error that is no JSON"]
        if not self._error.is_valid(error):
            found.append(f"an error in no protocol's shape: {answer.body[:200]!r}")
        elif error.get("request_id", ids[0]) != ids[0]:
            found.append("two request ids")
        line = request.data.split(b" HTTP/1.1", 1)[0].decode("latin-1")
        if line == request.target.name and answer.status not in self._documented(request):
            found.append(f"status {answer.status} is not documented")
        return found

    def _documented(self, request: Fuzzed) -> set[int]:
        target = request.target
        path = target.path
        if target.model is not None and (target.method, path) not in self._statuses:
            path = path.replace(f"/{target.model}", "/{name}", 1)
        return self._statuses[target.method, path]


def _meant(request: Fuzzed, status: int) -> bool:
    """Nobody can answer within a millisecond, and of the metrics Ray's own agents may say nothing while busy."""
    return (status == 504 and request.may_be_late) or (status == 503 and request.target.path == "/metrics")


def changed(before: Answer | None, after: Answer | None, method: str) -> str:
    """In which way a good request is not answered as before; empty if it is."""
    if before is None or after is None:
        return "no answer to a good request"
    if before.status != after.status:
        return f"{after.status} to a good request, not {before.status}: {after.body[:300]!r}"
    if method == "POST":
        try:
            assert_same(lasting(after.json()), lasting(before.json()))
        except AssertionError as difference:
            return f"another answer to a good request: {difference}"
    return ""


def lasting(answer: Any) -> Any:
    """But for what is of one answer only."""
    if not isinstance(answer, dict):
        return answer
    return {key: value for key, value in answer.items() if key not in _OF_ONE_ANSWER}

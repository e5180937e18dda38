"""The OpenAPI document and the server that wrote it agree, whatever a client makes of the document."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.fuzz.models import TASKS
from tests.fuzz.targets import ANSWERS, OF_THE_CLUSTER
from tests.ingress.test_openapi import OPERATIONS
from tests.inprocess import Running

load_all_checks()
AGREEMENT = [
    CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
        "allow_header_conformance",
    )
]


EXAMPLES = 80
"""Of each operation."""

TIMEOUT = "x-request-timeout-ms"
PATIENCE_MS = 60_000

SERVED = [operation for operation in OPERATIONS if operation[1] not in OF_THE_CLUSTER]


@pytest.fixture(scope="module")
def document(application: Running) -> Any:
    return schemathesis.openapi.from_url(f"{application.base_url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), SERVED)
def test_the_server_does_as_its_document_says(document: Any, method: str, path: str) -> None:
    """Sent is what the document allows, and what it does not; a failure tells the curl command that shows it."""
    operation = document[path][method]
    allowed = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    cases = [allowed]
    if method == "post":
        aimed = st.tuples(allowed, st.sampled_from(models_for(path))).map(lambda drawn: asked_of(*drawn))
        cases += [aimed, aimed, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)]

    @settings(max_examples=EXAMPLES, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(cases))
    def agree(case: Any) -> None:
        patient(case).call_and_validate(checks=AGREEMENT, timeout=60)

    agree()


def models_for(path: str) -> list[str]:
    """Those that can answer it."""
    tail = path.removeprefix("/models/{name}") or "/"
    return [ANSWERS[tail]] if tail in ANSWERS and tail != "/" else sorted(TASKS)


def asked_of(case: Any, model: str) -> Any:
    """The case for one model: most that the document allows are for models of other tasks, or for none."""
    in_path = "name" in (case.path_parameters or {})
    if in_path:
        case.path_parameters["name"] = model
    if isinstance(case.body, dict):  # Binary tensors are none.
        case.body.pop("model", None)
        case.body |= {} if in_path else {"model": model}
    return case


def patient(case: Any) -> Any:
    """The case without a deadline that nobody can keep, which 504 would be right for."""
    asked = str((case.headers or {}).get(TIMEOUT, ""))
    if asked.isascii() and asked.isdigit() and 1 <= int(asked) < PATIENCE_MS:
        case.headers[TIMEOUT] = str(PATIENCE_MS)
    return case

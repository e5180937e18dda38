"""The OpenAPI document and the server that wrote it agree, whatever a client makes of the document."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.fuzz.targets import OF_THE_CLUSTER
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


EXAMPLES = 60
"""Of each operation."""

SERVED = [operation for operation in OPERATIONS if operation[1] not in OF_THE_CLUSTER]


@pytest.fixture(scope="package")
def document(application: Running) -> Any:
    return schemathesis.openapi.from_url(f"{application.base_url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), SERVED)
def test_the_server_does_as_its_document_says(document: Any, method: str, path: str) -> None:
    """Sent is what the document allows, and what it does not; a failure tells the curl command that shows it."""
    operation = document[path][method]
    modes = [GenerationMode.POSITIVE]
    if method == "post":
        modes.append(GenerationMode.NEGATIVE)

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def agree(case: Any) -> None:
        case.call_and_validate(checks=AGREEMENT, timeout=60)

    agree()

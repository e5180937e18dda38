"""Every error has a status and a type in each protocol."""

from __future__ import annotations

import inspect

import pytest

from serve_app import errors
from serve_app.errors import ServeAppError
from serve_app.ingress.statuses import STATUSES, kind_of

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ServeAppError)]
TEI_TYPES = {"unhealthy", "backend", "overloaded", "validation", "tokenizer", "empty"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_an_entry_of_its_own(cls: type[ServeAppError]) -> None:
    assert cls in STATUSES


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_of_the_client_are_4xx_and_no_others_but_overload_and_a_failing_input(cls: type[ServeAppError]) -> None:
    is_4xx = 400 <= STATUSES[cls].status < 500
    assert is_4xx == (issubclass(cls, (errors.RequestError, errors.OverloadedError, errors.ModelFailureError)))


@pytest.mark.parametrize("cls", CLASSES)
def test_types_are_ones_that_tei_has(cls: type[ServeAppError]) -> None:
    assert STATUSES[cls].tei_type in TEI_TYPES


def test_an_error_made_elsewhere_is_told_as_its_nearest_ancestor() -> None:
    class Peculiar(errors.OverloadedError):
        pass

    assert kind_of(Peculiar("full")) == STATUSES[errors.OverloadedError]

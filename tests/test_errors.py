from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import pytest

from serve_app import errors
from serve_app.errors import CacheError, ConfigError, RequestError, ServeAppError, ServerError


def tree(cls: type[ServeAppError]) -> Iterator[type[ServeAppError]]:
    """The classes of `serve_app.errors`; Ray and others make subclasses of their own while they run."""
    yield cls
    for below in cls.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


EVERY_ERROR = list(tree(ServeAppError))
LEAVES = [cls for cls in EVERY_ERROR if list(tree(cls)) == [cls]]


@pytest.mark.parametrize("cls", EVERY_ERROR, ids=lambda cls: cls.__name__)
def test_an_error_pickles_to_itself(cls: type[ServeAppError]) -> None:
    error = cls("inputs[3]: too long; shorten it", retry_after_s=1.5)

    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is cls
        assert (twin.message, twin.retry_after_s, twin.code) == (error.message, 1.5, cls.code)
        assert str(twin) == "inputs[3]: too long; shorten it"


def test_an_error_pickles_twice() -> None:
    """As it does on its way model → tokenizer → ingress."""
    once = pickle.loads(pickle.dumps(errors.OverloadedError("queue full", retry_after_s=2.0)))

    assert pickle.loads(pickle.dumps(once)).retry_after_s == 2.0


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn = re.findall(r"^[│├└─ ]*(\w+Error)\b", errors.__doc__ or "", flags=re.MULTILINE)

    assert drawn == [cls.__name__ for cls in EVERY_ERROR]


def test_every_leaf_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in LEAVES]

    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)
def test_a_leaf_hangs_on_the_branch_that_says_whose_fault_it_is(cls: type[ServeAppError]) -> None:
    assert sum(issubclass(cls, branch) for branch in (ConfigError, CacheError, RequestError, ServerError)) == 1

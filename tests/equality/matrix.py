"""Models and texts of the matrix, and how an answer over HTTP is asked for and compared."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest

from serve_app.config import ModelConfig
from tests.tasks.families import EMPTY, LIMIT, LONG, TEXTS, Family, of_length

TOLERANCE = 1e-4

TOGETHER: dict[str, Any] = {"max_concurrent_batches": 1, "max_batch_characters": 1_000_000, "max_windows": 2000}
"""Settings under which requests that are posted at the same time share a batch."""

Models = Mapping[str, Family]
"""By the name under which each is served."""


def configs(models: Models, **keys: Any) -> list[ModelConfig]:
    return [
        ModelConfig(name=name, source=str(given.folder), max_input_tokens=given.card.max_input_tokens, **keys)
        for name, given in models.items()
    ]


def texts_of(given: Family, *, empty: bool = True) -> list[str]:
    """One token, emoji, combining characters, right to left, NUL, CRLF, no space, at the limit and beyond, …"""
    at_limit = [of_length(given, LIMIT), of_length(given, LIMIT + 1)]
    return [*TEXTS.values(), *(EMPTY.values() if empty else ()), *LONG.values(), *at_limit]


def ask(url: str, bodies: Sequence[Any]) -> list[Any]:
    """Posted at the same time, so that requests are computed together; the answers' JSON."""
    answers = asyncio.run(_post_all(url, bodies))
    for answer in answers:
        assert answer.status_code == 200, answer.text
    return [answer.json() for answer in answers]


async def _post_all(url: str, bodies: Sequence[Any]) -> list[httpx.Response]:
    async with httpx.AsyncClient(timeout=60) as client:
        return list(await asyncio.gather(*(client.post(url, json=body) for body in bodies)))


def attentions(url: str) -> set[str]:
    """How the models below `url` are computed: packed, or why not."""
    told = httpx.get(url.removesuffix("/models") + "/info", timeout=60).json()
    return {model["attention"] for model in told["models"]}


def refusal(url: str, body: Any) -> tuple[int, str]:
    """Status and message of a request that must not be answered."""
    answer = httpx.post(url, json=body, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    return answer.status_code, answer.json()["error"]


def assert_same(got: Any, wanted: Any, where: str = "answer") -> None:
    """The same in every key, place, word and order; numbers with a point to 1e-4."""
    if isinstance(wanted, Mapping):
        assert got.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_same(got[key], value, f"{where}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted), where
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(wanted, (str, int)) or wanted is None:
        assert got == wanted, where
    else:
        assert got == pytest.approx(float(wanted), abs=TOLERANCE), where

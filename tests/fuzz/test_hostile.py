"""Each of the corpus of hostile bodies, to every route and the models behind it; after each a good request is answered.

tests/ingress/test_hostile.py sends the same to the edge alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.equality.matrix import assert_same
from tests.fuzz.models import TASKS
from tests.fuzz.run import Fuzz
from tests.fuzz.targets import Target
from tests.fuzz.verdict import lasting
from tests.ingress.test_hostile import BAD_BODIES, bad_texts
from tests.ingress.test_openapi import POSTS
from tests.inprocess import Running


@pytest.fixture(scope="module")
def targets(application: Running) -> list[Target]:
    """Those that can answer."""
    return [target for target in Fuzz(application.base_url, 0).targets if target.weight > 1]


@pytest.fixture
def client(application: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=application.base_url, timeout=60, trust_env=False) as client:
        yield client


def hostile_bodies(good: Any) -> Iterator[tuple[str, bytes]]:
    """The corpus as it is, and each of its texts in the place of every field of a good body."""
    yield from BAD_BODIES.items()
    for field in good:
        rest = json.dumps({key: value for key, value in good.items() if key != field}).encode()
        separator = b"" if rest == b"{}" else b","
        for name, text in bad_texts():
            yield f"{name} as {field}", b'{"%s":%s%s%s' % (field.encode(), text, separator, rest[1:])


@pytest.mark.parametrize("path", [path for path in POSTS if path not in ("/models/{name}", "/v2/models/{name}/infer")])
def test_a_route_stands_the_corpus(client: httpx.Client, targets: list[Target], path: str) -> None:
    start, _, end = path.partition("{name}")
    (target, *_) = [each for each in targets if each.path.startswith(start) and each.path.endswith(end)]
    stands(client, target)


@pytest.mark.parametrize("path", ["/models/{name}", "/v2/models/{name}/infer"])
@pytest.mark.parametrize("model", TASKS)
def test_a_task_stands_the_corpus(client: httpx.Client, targets: list[Target], path: str, model: str) -> None:
    (target,) = [each for each in targets if each.path == path.format(name=model)]
    stands(client, target)


def stands(client: httpx.Client, target: Target) -> None:
    before = client.post(target.path, json=target.good)
    assert before.status_code == 200, before.text
    for name, body in hostile_bodies(target.good):
        answer = client.post(target.path, content=body)
        assert answer.status_code < 500, (name, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"], name
            assert answer.headers["x-request-id"], name
        after = client.post(target.path, json=target.good)
        assert after.status_code == 200, (name, after.text)
        assert_same(lasting(after.json()), lasting(before.json()), f"after {name}")

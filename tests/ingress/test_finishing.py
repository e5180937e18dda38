"""What is much to do is done beside the event loop, and what is little on it."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from serve_app.errors import InvalidInputError
from serve_app.ingress.finishing import MOST_STEPS, Finishing, steps_after, steps_before
from serve_app.options import (
    EmbeddingOptions,
    FillMaskOptions,
    QuestionAnsweringOptions,
    TaskOptions,
    TokenClassificationOptions,
    ZeroShotOptions,
)
from serve_app.types import Features, Request
from tests.batches import batch_of


async def test_little_work_stays_on_the_event_loop() -> None:
    assert await Finishing().run(MOST_STEPS, threading.get_ident) == threading.get_ident()


async def test_the_event_loop_turns_while_much_work_is_done() -> None:
    turned = threading.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    assert await Finishing().run(MOST_STEPS + 1, turned.wait, 20)


@pytest.mark.parametrize("steps", [0, MOST_STEPS + 1])
async def test_errors_come_back_either_way(steps: int) -> None:
    def fail() -> None:
        raise InvalidInputError("no")

    with pytest.raises(InvalidInputError):
        await Finishing().run(steps, fail)


def request(options: TaskOptions, inputs: int = 1) -> Request:
    return Request("1", "tiny", "any", ("a",) * inputs, options)


def features(sequences: int, tokens: int, rows: int, columns: int) -> Features:
    return Features(batch_of([tokens] * sequences), np.zeros((rows, columns), np.float32))


USUAL = [
    (EmbeddingOptions(), features(256, 128, 256, 384)),
    (TokenClassificationOptions(), features(1, 128, 128, 9)),
    (TokenClassificationOptions("average"), features(1, 128, 128, 9)),
    (FillMaskOptions(), features(1, 128, 5, 2)),
    (QuestionAnsweringOptions(), features(2, 384, 768, 2)),
    (ZeroShotOptions(("a", "b", "c")), features(3, 128, 3, 3)),
]
LARGE = [
    (TokenClassificationOptions(), features(1000, 128, 128_000, 9)),
    (TokenClassificationOptions("average"), features(100, 128, 12_800, 9)),
    (FillMaskOptions(top_k=1000), features(1, 128, 1000, 2)),
    (QuestionAnsweringOptions(top_k=1000), features(2, 384, 768, 2)),
    (QuestionAnsweringOptions(max_answer_len=10_000), features(200, 384, 76_800, 2)),
]


@pytest.mark.parametrize(("options", "made"), USUAL)
def test_usual_answers_are_little_work(options: TaskOptions, made: Features) -> None:
    assert steps_after(request(options), made) <= MOST_STEPS


@pytest.mark.parametrize(("options", "made"), LARGE)
def test_large_answers_are_much_work(options: TaskOptions, made: Features) -> None:
    assert steps_after(request(options), made) > MOST_STEPS


def test_many_targets_or_long_ones_are_much_work() -> None:
    assert steps_before(request(FillMaskOptions(targets=("the", "a")))) <= MOST_STEPS
    assert steps_before(request(FillMaskOptions(targets=("a" * 10_000,) * 100))) > MOST_STEPS
    assert steps_before(request(ZeroShotOptions(("a",) * 100), inputs=100)) > MOST_STEPS

"""Answers made of what the model left, where that is more than the event loop may do between two requests.

Small ones, which nearly all are, are made at once: a thread would cost them more than they take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve_app.options import (
    ClassificationOptions,
    FillMaskOptions,
    QuestionAnsweringOptions,
    TokenClassificationOptions,
    ZeroShotOptions,
)
from serve_app.types import Features, Request

T = TypeVar("T")

MOST_STEPS = 4000
"""Done on the event loop: a step is about a microsecond."""

_CHARACTERS = 4
"""Of a target, tokenized in one step."""

_ELEMENTS = 1000
"""Of arrays, computed in one step."""


class Finishing:
    """Threads of their own, few of them: each takes the event loop's turn from it for milliseconds."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="finishing")

    async def run(self, steps: int, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` returns or raises; it takes about so many steps."""
        if steps <= MOST_STEPS:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def steps_before(request: Request) -> int:
    """About how many steps a task's `prepare` and `arguments` take."""
    options = request.options
    if isinstance(options, FillMaskOptions):
        return sum(2 + len(target) // _CHARACTERS for target in options.targets or ())
    if isinstance(options, ZeroShotOptions):
        return len(request.inputs) * len(options.labels)
    return 0


def steps_after(request: Request, features: Features) -> int:
    """About how many steps a task's `postprocess` takes."""
    options, rows, tokens = request.options, len(features.values), features.tokens
    if isinstance(options, FillMaskOptions):
        longest = int(tokens.lengths().max(initial=0))
        return rows * (10 + longest // 2)
    if isinstance(options, TokenClassificationOptions):
        return rows * (2 if options.aggregation == "none" else 15)
    if isinstance(options, QuestionAnsweringOptions):
        spans = tokens.num_sequences * (100 + 4 * options.top_k)
        return spans + rows * min(options.max_answer_len, rows) // 100
    if isinstance(options, ClassificationOptions | ZeroShotOptions):
        return features.values.size
    return tokens.num_sequences + features.values.size // _ELEMENTS

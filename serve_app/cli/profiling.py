"""The measurements behind `serve-app profile`, each in one process with no server; run as a child of the command."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.cli.bench.ceiling import split
from serve_app.cli.bench.children import Command, answer_commands
from serve_app.cli.bench.corpus import make_corpus, make_texts
from serve_app.config import ModelConfig
from serve_app.tasks.card import read_card
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import TokenBatch, TokenizeRequest, concatenate

LEAST_S = 0.3
"""Each measurement is repeated for at least so long, and the fastest taken: what else runs only makes it slower."""


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """One model, a corpus, and the intra-op threads of the process that measures."""

    model_path: str
    max_input_tokens: int
    texts: int
    seed: int
    threads: int


class Measurements:
    """A model and a tokenizer in this process, and how long each step takes."""

    def __init__(self, plan: ProfilePlan) -> None:
        path = Path(plan.model_path)
        config = ModelConfig(name="profile", source=str(path), num_threads=plan.threads)
        read_card(path, config, "")
        self._plan, self._path = plan, path
        self._encoder = Encoder(path, plan.max_input_tokens)
        self._corpus = make_corpus(path, plan.texts, plan.seed).texts

        # Seconds to import, so after what can be wrong with the model's files.
        from serve_app.model.loader import load
        from serve_app.model.runner import Runner

        self._runner = Runner(load(path, config, plan.max_input_tokens))

    def answer(self, command: Command) -> Any:
        measure: Callable[..., Any] = getattr(self, command["measure"])
        return measure(**{key: value for key, value in command.items() if key != "measure"})

    def corpus(self) -> dict[str, Any]:
        """All texts of the corpus: seconds to tokenize them, and their tokens."""
        batch = self._encode(self._corpus)
        return {
            "tokenize_s": _seconds(lambda: self._encode(self._corpus)),
            "tokens": len(batch.input_ids),
            "attention": self._runner.mode,
        }

    def length(self, tokens: int, budget: int) -> dict[str, float]:
        """Seconds for texts of one length: to tokenize and to compute as many as fill the budget, and one alone."""
        texts = make_texts(self._path, [tokens] * max(1, budget // tokens), self._plan.seed)
        full, alone = self._encode(texts), self._encode(texts[:1])
        return {
            "texts": len(texts),
            "tokenize_s": _seconds(lambda: self._encode(texts)),
            "forward_s": _seconds(lambda: self._runner.run(full)),
            "alone_s": _seconds(lambda: self._runner.run(alone)),
        }

    def budget(self, tokens: int) -> float:
        """Seconds for the corpus in the order of its arrival, in batches of at most so many tokens.

        That is what the scheduler makes of a queue that is never empty.
        """
        parts = list(split(self._encode(self._corpus), tokens))
        return _seconds(lambda: _run_all(self._runner.run, parts))

    def _encode(self, texts: Sequence[str]) -> TokenBatch:
        return concatenate([self._encoder.encode([TokenizeRequest(tuple(texts), long_texts="truncate")])])


def _run_all(run: Callable[[TokenBatch], object], parts: Sequence[TokenBatch]) -> None:
    for part in parts:
        run(part)


def _seconds(work: Callable[[], object]) -> float:
    work()
    return min(_timed(work))


def _timed(work: Callable[[], object]) -> Iterator[float]:
    end = time.perf_counter() + LEAST_S
    while True:
        started = time.perf_counter()
        work()
        yield time.perf_counter() - started
        if time.perf_counter() >= end:
            return


if __name__ == "__main__":
    answer_commands(lambda: Measurements(ProfilePlan(**json.loads(sys.argv[1]))).answer)

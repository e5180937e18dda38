"""What the hardware does with these texts and this model when there is no server: sorted, batched, in one process.

Runs in processes of its own, which are gone while the server is measured. The child reads one JSON command a line and
answers each with one line, so that several children (`--ceiling-processes`) can be made to start at the same moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.cli.bench.corpus import make_corpus
from serve_app.config import ModelConfig
from serve_app.errors import ServeAppError
from serve_app.tasks.card import read_card
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import FloatArray, TokenBatch, TokenizeRequest


@dataclass(frozen=True, slots=True)
class CeilingPlan:
    """`processes` times `threads` should be the cores. Each budget (tokens of one forward pass) is tried."""

    model_path: str
    max_input_tokens: int
    texts: int
    seed: int
    processes: int
    threads: int
    budgets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The fastest of the budgets; `tokenize_s` and `forward_s` are the sums over the processes."""

    texts_per_s: float
    tokens_per_s: float
    tokenize_s: float
    forward_s: float
    budget: int
    attention: str


class CeilingError(ServeAppError):
    """A child ended without an answer."""


def measure_ceiling(plan: CeilingPlan) -> Ceiling:
    """Load the model, warm up, and go through all the texts once for each budget. Raises CeilingError."""
    with _Children(plan) as children:
        children.ask({"budget": plan.budgets[0]})
        return max((_round(children, budget) for budget in plan.budgets), key=lambda ceiling: ceiling.tokens_per_s)


def direct_vectors(plan: CeilingPlan) -> FloatArray:
    """Vectors (texts, d) of the whole corpus in its order, computed by the same engine without a server."""
    with tempfile.TemporaryDirectory() as folder, _Children(plan) as children:
        files = [str(Path(folder, f"{i}.npy")) for i in range(plan.processes)]
        children.ask(*({"budget": plan.budgets[0], "vectors": file} for file in files))
        parts = [np.load(file) for file in files]
    vectors = np.empty((plan.texts, parts[0].shape[1]), np.float32)
    for i, part in enumerate(parts):
        vectors[i :: plan.processes] = part
    return vectors


def _round(children: _Children, budget: int) -> Ceiling:
    started = time.perf_counter()
    answers = children.ask({"budget": budget})
    elapsed = time.perf_counter() - started
    return Ceiling(
        texts_per_s=sum(answer["texts"] for answer in answers) / elapsed,
        tokens_per_s=sum(answer["tokens"] for answer in answers) / elapsed,
        tokenize_s=sum(answer["tokenize_s"] for answer in answers),
        forward_s=sum(answer["forward_s"] for answer in answers),
        budget=budget,
        attention=answers[0]["attention"],
    )


class _Children:
    """So many processes, ready before any is asked."""

    def __init__(self, plan: CeilingPlan) -> None:
        threads = str(plan.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        environment["TOKENIZERS_PARALLELISM"] = "true"
        command = [sys.executable, "-m", __name__, json.dumps(asdict(plan))]
        self._processes = [
            subprocess.Popen(
                [*command, str(number)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for number in range(plan.processes)
        ]

    def __enter__(self) -> _Children:
        try:
            for process in self._processes:
                _read(process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def ask(self, *commands: dict[str, Any]) -> list[Any]:
        """One command for all, or one for each; answers when all have answered."""
        each = commands if len(commands) == len(self._processes) else commands * len(self._processes)
        for process, command in zip(self._processes, each, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [_read(process) for process in self._processes]


def _read(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise CeilingError(f"the process that measures the ceiling ended with status {process.wait()}; see above")
    return json.loads(line)


class InProcess:
    """The engine without a server; `part` of `parts` of the corpus, every parts-th text."""

    def __init__(self, plan: CeilingPlan, part: int) -> None:
        path = Path(plan.model_path)
        config = ModelConfig(name="ceiling", source=str(path), num_threads=plan.threads)
        pooling = read_card(path, config, "").pooling
        self.texts = make_corpus(path, plan.texts, plan.seed).texts[part :: plan.processes]
        self._encoder = Encoder(path, plan.max_input_tokens)

        # Seconds to import, so after what can be wrong with the model's files.
        from serve_app.model.loader import load
        from serve_app.model.runner import Runner
        from serve_app.tasks.heads import pooled

        self._runner = Runner(load(path, config, plan.max_input_tokens), pooled(pooling))

    def compute(self, budget: int) -> tuple[FloatArray, dict[str, Any]]:
        """Vectors (n, d) of this part's texts in their order, and what they took."""
        started = time.perf_counter()
        batch = self._encoder.encode([TokenizeRequest(self.texts, truncate=True)])
        tokenized = time.perf_counter()
        order = np.argsort(batch.lengths(), kind="stable")
        longest_first = gather(batch, order[::-1])
        rows = np.concatenate([self._runner.run(part) for part in split(longest_first, budget)])
        vectors = np.empty_like(rows)
        vectors[order[::-1]] = rows
        ended = time.perf_counter()
        return vectors, {
            "texts": batch.num_sequences,
            "tokens": len(batch.input_ids),
            "tokenize_s": tokenized - started,
            "forward_s": ended - tokenized,
            "attention": self._runner.mode,
        }


def gather(batch: TokenBatch, order: npt.NDArray[np.int64]) -> TokenBatch:
    """The sequences of `batch` in another order, as one request."""
    pieces = [batch.input_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] for i in order]
    lengths = batch.lengths()[order]
    return TokenBatch(
        input_ids=np.concatenate(pieces),
        cu_seqlens=np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)]),
        cu_requests=np.array([0, len(order)], np.int32),
        truncated=batch.truncated[order],
    )


def split(batch: TokenBatch, budget: int) -> Iterator[TokenBatch]:
    """Runs of sequences with at most `budget` tokens; one that is longer goes alone."""
    first = 0
    while first < batch.num_sequences:
        last = int(np.searchsorted(batch.cu_seqlens, batch.cu_seqlens[first] + budget, side="right")) - 1
        last = max(last, first + 1)
        yield batch.select(first, last)
        first = last


def main(arguments: Sequence[str]) -> None:
    """The child: commands from stdin until it is closed."""
    raw = json.loads(arguments[0])
    plan = CeilingPlan(**(raw | {"budgets": tuple(raw["budgets"])}))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # what libraries print must not get between the answers
    engine = InProcess(plan, int(arguments[1]))
    print("{}", file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        vectors, took = engine.compute(command["budget"])
        if "vectors" in command:
            np.save(command["vectors"], vectors)
        print(json.dumps(took), file=answers)


if __name__ == "__main__":
    main(sys.argv[1:])

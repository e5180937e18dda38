"""What the hardware does with these texts and this model when there is no server: sorted, batched, in one process.

Runs in processes of its own, which are gone while the server is measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import numpy.typing as npt

from serve_app.cli.bench.children import Children, Command, answer_commands
from serve_app.cli.bench.corpus import make_corpus
from serve_app.cli.bench.loads import LOADS
from serve_app.cli.bench.wire import EMBEDDING
from serve_app.config import ModelConfig, TaskName
from serve_app.outputs import TaskOutput
from serve_app.tasks.card import read_card
from serve_app.tasks.registry import TASKS
from serve_app.tasks.stock_tokenizer import read_stock_tokenizer
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.tokenizer.encoder import Encoder
from serve_app.types import Features, FloatArray, HeadArguments, Int32Array, Request, TokenBatch, TokenizeRequest

if TYPE_CHECKING:
    from serve_app.model.rows import SequenceRows


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
    task: str = EMBEDDING


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The fastest of the budgets; seconds are the sums over the processes."""

    texts_per_s: float
    tokens_per_s: float
    tokenize_s: float
    forward_s: float
    postprocess_s: float
    """Making the answers of tasks beside embedding out of what the head left."""
    budget: int
    attention: str


def measure_ceiling(plan: CeilingPlan) -> Ceiling:
    """Load the model, warm up, and go through all the texts once for each budget. Raises ChildError."""
    with _children(plan) as children:
        children.ask({"budget": plan.budgets[0]})
        return max((_round(children, budget) for budget in plan.budgets), key=lambda ceiling: ceiling.tokens_per_s)


def direct_vectors(plan: CeilingPlan) -> FloatArray:
    """Vectors (texts, d) of the whole corpus in its order, computed by the same engine without a server."""
    with tempfile.TemporaryDirectory() as folder, _children(plan) as children:
        files = [str(Path(folder, f"{i}.npy")) for i in range(plan.processes)]
        children.ask(*({"budget": plan.budgets[0], "vectors": file} for file in files))
        parts = [np.load(file) for file in files]
    vectors = np.empty((plan.texts, parts[0].shape[1]), np.float32)
    for i, part in enumerate(parts):
        vectors[i :: plan.processes] = part
    return vectors


def _round(children: Children, budget: int) -> Ceiling:
    started = time.perf_counter()
    answers = children.ask({"budget": budget})
    elapsed = time.perf_counter() - started
    return Ceiling(
        texts_per_s=sum(answer["texts"] for answer in answers) / elapsed,
        tokens_per_s=sum(answer["tokens"] for answer in answers) / elapsed,
        tokenize_s=sum(answer["tokenize_s"] for answer in answers),
        forward_s=sum(answer["forward_s"] for answer in answers),
        postprocess_s=sum(answer["postprocess_s"] for answer in answers),
        budget=budget,
        attention=answers[0]["attention"],
    )


def _children(plan: CeilingPlan) -> Children:
    return Children(__name__, json.dumps(asdict(plan)), plan.processes, plan.threads)


@dataclass(frozen=True, slots=True)
class Computed:
    """What the head left (r, d) of the texts in their order, the answers (None for embeddings), and what they took."""

    values: FloatArray
    answers: TaskOutput | None
    took: Mapping[str, Any]


class InProcess:
    """The engine without a server; `part` of `parts` of the corpus, every parts-th text."""

    def __init__(self, plan: CeilingPlan, part: int) -> None:
        path = Path(plan.model_path)
        task = plan.task if plan.task in get_args(TaskName) else None
        config = ModelConfig(
            name="ceiling",
            source=str(path),
            num_threads=plan.threads,
            task=cast("TaskName | None", task),
            max_input_tokens=plan.max_input_tokens,
        )
        stock = read_stock_tokenizer(path)
        self._card = stock.completed(read_card(path, config, ""))
        self._task = plan.task
        corpus = make_corpus(path, plan.texts, plan.seed)
        self.texts = corpus.texts[part :: plan.processes]
        self._tokens = sum(corpus.computed_tokens(plan.max_input_tokens)[part :: plan.processes])
        self._encoder = Encoder(path, plan.max_input_tokens, stock.answering(self._card.task))
        self._vocabulary = Vocabulary.read(self._encoder.definition)
        self._request = self._asked()

        # Seconds to import, so after what can be wrong with the model's files.
        from serve_app.model.loader import load
        from serve_app.model.runner import Runner

        self._runner = Runner(load(path, config, plan.max_input_tokens))

    def compute(self, budget: int) -> Computed:
        """All texts once, in passes of at most `budget` tokens."""
        started = time.perf_counter()
        batch, head, arguments = self._encoded()
        tokenized = time.perf_counter()
        rows = self._rows(batch, head, arguments, budget)
        computed = time.perf_counter()
        answers = None
        if self._request is not None:
            features = Features(batch, rows.values, rows.cu_rows)
            answers = TASKS[self._task].postprocess(self._request, self._card, features, self._vocabulary)
        ended = time.perf_counter()
        took = {
            "texts": len(self.texts),
            "tokens": self._tokens,
            "tokenize_s": tokenized - started,
            "forward_s": computed - tokenized,
            "postprocess_s": ended - computed,
            "attention": self._runner.mode,
        }
        return Computed(rows.values, answers, took)

    def _rows(
        self, batch: TokenBatch, head: str | None, arguments: tuple[HeadArguments | None, ...], budget: int
    ) -> SequenceRows:
        """Of the sequences in their order, computed from long to short."""
        from serve_app.model.rows import stack

        longest_first = np.argsort(batch.lengths(), kind="stable")[::-1]
        parts = split(gather(batch, longest_first), budget)
        rows = [self._runner.run(part, head, arguments * part.num_sequences) for part in parts]
        return stack(rows).in_order(longest_first)

    def _encoded(self) -> tuple[TokenBatch, str | None, tuple[HeadArguments | None, ...]]:
        """All texts, the head's name and what it needs to know of each sequence."""
        if self._request is None:
            return self._encoder.encode([TokenizeRequest(self.texts, long_texts="truncate")]), None, ()
        task = TASKS[self._task]
        argument = task.arguments(self._request, self._vocabulary)
        batch = self._encoder.encode([task.prepare(self._request, self._card)])
        return batch, task.head, () if argument is None else (argument,)

    def _asked(self) -> Request | None:
        """All texts in one request; None for embeddings, which need none."""
        if self._task == EMBEDDING:
            return None
        load = LOADS[self._task]
        assert load.options is not None
        token_id = self._card.mask_token_id
        mask = "" if token_id is None else self._vocabulary.token(token_id)
        # Long texts are cut, or read in windows where that is the task's own way, as the server does unasked.
        return Request("ceiling", "ceiling", self._task, tuple(load.inputs(self.texts, mask)), load.options)


def gather(batch: TokenBatch, order: npt.NDArray[np.int64]) -> TokenBatch:
    """The sequences of `batch` in another order, as one request."""
    pieces = [batch.input_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] for i in order]
    lengths = batch.lengths()[order]
    return TokenBatch(
        input_ids=np.concatenate(pieces),
        cu_seqlens=np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)]),
        cu_requests=np.array([0, len(order)], np.int32),
        truncated=batch.truncated[order],
        token_type_ids=_types(batch, order),
    )


def _types(batch: TokenBatch, order: npt.NDArray[np.int64]) -> Int32Array | None:
    types = batch.token_type_ids
    if types is None:
        return None
    return np.concatenate([types[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] for i in order])


def split(batch: TokenBatch, budget: int) -> Iterator[TokenBatch]:
    """Runs of sequences with at most `budget` tokens; one that is longer goes alone."""
    first = 0
    while first < batch.num_sequences:
        last = int(np.searchsorted(batch.cu_seqlens, batch.cu_seqlens[first] + budget, side="right")) - 1
        last = max(last, first + 1)
        yield batch.select(first, last)
        first = last


def main(arguments: Sequence[str]) -> None:
    """The child: computes all of its texts for each command."""
    raw = json.loads(arguments[0])
    plan = CeilingPlan(**(raw | {"budgets": tuple(raw["budgets"])}))

    def prepare() -> Callable[[Command], Any]:
        engine = InProcess(plan, int(arguments[1]))

        def answer(command: Command) -> Any:
            computed = engine.compute(command["budget"])
            if "vectors" in command:
                np.save(command["vectors"], computed.values)
            return computed.took

        return answer

    answer_commands(prepare)


if __name__ == "__main__":
    main(sys.argv[1:])

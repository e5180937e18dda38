"""What crosses from one deployment to another, with shapes and dtypes.

All arrays are host numpy arrays. `n` counts sequences, `m` requests, `total` tokens of a whole call.
A call carries the requests of one coalesced batch, so that each hop is paid once per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.errors import ServeAppError

TokenIds: TypeAlias = tuple[int, ...]
TextPair: TypeAlias = tuple[str, str]
TextInput: TypeAlias = str | TextPair | TokenIds
"""One thing to encode: a text, a pair of texts, or token ids that the client made itself."""

Side: TypeAlias = Literal["left", "right"]
Priority: TypeAlias = Literal["interactive", "bulk"]

Int32Array: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """How an embedding is finished; None means as the model's own files say."""

    normalize: bool | None = None
    dimensions: int | None = None
    prompt_name: str | None = None


@dataclass(frozen=True, slots=True)
class SimilarityOptions:
    """Cosine of the first input with each of the others; `prompt_name` as for embeddings."""

    prompt_name: str | None = None


TaskOptions: TypeAlias = EmbeddingOptions | SimilarityOptions


@dataclass(frozen=True, slots=True)
class Request:
    """One client request of one task, after a protocol has read its wire shape."""

    id: str
    model: str
    task: str
    inputs: tuple[TextInput, ...]
    options: TaskOptions
    truncate: bool | None = None
    """Cut inputs that are too long (True), refuse them (False), or as the model is configured (None)."""
    truncation_side: Side = "right"
    priority: Priority = "interactive"


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """One request's part of a call to a tokenizer replica."""

    inputs: tuple[TextInput, ...]
    truncate: bool
    truncation_side: Side = "right"
    prompt: str = ""
    """Put before every text (not before token ids)."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The sequences of `m` requests, flat and without padding.

    `input_ids` (total,) int32; `cu_seqlens` (n + 1,) int32, where each sequence starts and the last one ends;
    `cu_requests` (m + 1,) int32, the same over sequences, for requests; `token_type_ids` (total,) int32 or None
    where all are zero; `truncated` (n,) bool. A request in `failures` (by index) has no sequences.
    """

    input_ids: Int32Array
    cu_seqlens: Int32Array
    cu_requests: Int32Array
    truncated: npt.NDArray[np.bool_]
    token_type_ids: Int32Array | None = None
    failures: Mapping[int, ServeAppError] = field(default_factory=dict)
    tokenize_s: float = 0.0

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_requests(self) -> int:
        return len(self.cu_requests) - 1

    def lengths(self) -> Int32Array:
        """Tokens of each sequence, (n,) int32."""
        return np.diff(self.cu_seqlens)

    def sequences_of(self, request: int) -> slice:
        """The sequences of one request, as a slice over rows."""
        return slice(int(self.cu_requests[request]), int(self.cu_requests[request + 1]))

    def tokens_of(self, request: int) -> int:
        rows = self.sequences_of(request)
        return int(self.cu_seqlens[rows.stop] - self.cu_seqlens[rows.start])

    def select(self, first: int, last: int) -> TokenBatch:
        """Sequences first..last-1 as a batch of one request; views, no copies of tokens."""
        start, stop = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        return TokenBatch(
            input_ids=self.input_ids[start:stop],
            cu_seqlens=self.cu_seqlens[first : last + 1] - np.int32(start),
            cu_requests=np.array([0, last - first], np.int32),
            truncated=self.truncated[first:last],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[start:stop],
        )


def concatenate(batches: list[TokenBatch]) -> TokenBatch:
    """One batch with the sequences of all, in order; its requests are the requests of all, failures aside.

    Raises ValueError if `batches` is empty.
    """
    if not batches:
        raise ValueError("concatenate needs at least one batch")
    if len(batches) == 1:
        return batches[0]
    has_types = any(b.token_type_ids is not None for b in batches)
    return TokenBatch(
        input_ids=np.concatenate([b.input_ids for b in batches]),
        cu_seqlens=_chain([b.cu_seqlens for b in batches]),
        cu_requests=_chain([b.cu_requests for b in batches]),
        truncated=np.concatenate([b.truncated for b in batches]),
        token_type_ids=np.concatenate(list(_types_or_zeros(batches))) if has_types else None,
    )


def _chain(cumulative: list[Int32Array]) -> Int32Array:
    lengths = np.concatenate([np.diff(c) for c in cumulative])
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])


def _types_or_zeros(batches: list[TokenBatch]) -> Iterator[Int32Array]:
    for batch in batches:
        yield np.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """One call to a model replica: which head to apply, and how long each request may still take."""

    tokens: TokenBatch
    head: str
    time_left_s: tuple[float | None, ...]
    """Seconds each request has left when the call is sent, (m,); None for no limit. Durations, because the clocks
    of two nodes differ."""
    priorities: tuple[Priority, ...] = ()
    """(m,), or empty where all are interactive."""

    @property
    def weight(self) -> int:
        """Tokens, by which calls are spread over replicas."""
        return len(self.tokens.input_ids)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the head left of each sequence: `values` (n, d) float32, `queue_s` and `forward_s` (m,) float64.

    A request in `failures` (by index) failed alone; its rows are zeros.
    """

    values: FloatArray
    queue_s: npt.NDArray[np.float64]
    forward_s: npt.NDArray[np.float64]
    failures: Mapping[int, ServeAppError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one request's time went, in seconds; `queue_s` is the wait in the model replica."""

    total_s: float = 0.0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer before a protocol writes it: the task's `output` and what it cost."""

    output: FloatArray
    tokens: int
    timings: Timings
    truncated: int = 0
    """How many of the inputs were cut."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model's own files (and its configuration, which wins) say about it."""

    name: str
    source: str
    revision: str
    task: str
    model_type: str
    max_input_tokens: int
    """Tokens of one sequence, special tokens included."""
    hidden_size: int
    pooling: Literal["mean", "cls", "lasttoken"]
    normalize: bool
    auto_truncate: bool
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a model replica says of itself, for `/info`."""

    dtype: str
    device: str
    attention: str
    """"packed" or, with the reason, "bucketed: …"."""
    max_batch_tokens: int
    memory: Mapping[str, float] = field(default_factory=dict)

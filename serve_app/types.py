"""What crosses from one deployment to another, with shapes and dtypes.

All arrays are host numpy arrays. `n` counts sequences, `m` requests, `total` tokens of a whole call.
A call carries the requests of one coalesced batch, so that each hop is paid once per batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.errors import OverloadedError, ServeAppError, VersionGoneError
from serve_app.options import GenerationOptions, TaskOptions
from serve_app.outputs import TaskOutput

TokenIds: TypeAlias = tuple[int, ...]
TextPair: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else a template may read of it: `name`, `tool_calls`, `tool_call_id`, `reasoning_content`. Plain JSON."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the model's chat template turns into one prompt."""

    messages: tuple[ChatMessage, ...]
    continues: bool = False
    """Whether the answer goes on with the last message."""
    begins_turn: bool = True
    """Whether a turn of the assistant's is begun after the last message; never where that is continued."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template, by name. Plain JSON."""

    def __len__(self) -> int:
        """Characters, as of a text."""
        told = sum(len(message.content) + _characters(message.fields) for message in self.messages)
        return told + _characters(self.variables)


def _characters(value: Any) -> int:
    """Of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _characters(each) for key, each in value.items())
    return sum(map(_characters, value)) if isinstance(value, list) else 0


TextInput: TypeAlias = str | TextPair | TokenIds | Chat
"""One thing to encode: a text, a pair of texts, token ids that the client made itself, or a conversation."""

Side: TypeAlias = Literal["left", "right"]
Priority: TypeAlias = Literal["interactive", "bulk"]

BULK_EVERY = 4
"""While requests of both priorities wait, bulk ones have every 4th turn: they never starve."""

LongTexts: TypeAlias = Literal["truncate", "error", "windows"]
"""What becomes of a text that is longer than the model takes: cut, refused, or read in overlapping windows."""

Activation: TypeAlias = Literal["identity", "sigmoid", "tanh"]
"""What a cross-encoder makes its scores with, of its logits."""

Int32Array: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(slots=True)
class Usage:
    """What computing one request has cost so far. Whoever computes it counts here, so that the cost is known whatever
    becomes of the answer.
    """

    tokens: int = 0
    """Tokens read and generated, as far as they are known."""
    is_uncertain: bool = False
    """Whether more may have been computed than `tokens` tells: the work is under way, or was given up or failed."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The block computes, and its cost is known when it ends well.

        An error leaves the cost uncertain, except one that says that nothing was computed.
        """
        self.is_uncertain = True
        try:
            yield
        except (OverloadedError, VersionGoneError):
            self.is_uncertain = False
            raise
        self.is_uncertain = False


@dataclass(frozen=True, slots=True)
class Request:
    """One client request of one task, after a protocol has read its wire shape."""

    id: str
    model: str
    task: str
    inputs: tuple[TextInput, ...]
    options: TaskOptions
    long_texts: LongTexts | None = None
    """What becomes of inputs that are too long; None: as the model is configured."""
    truncation_side: Side | None = None
    """Where inputs are cut; None: as the model is configured."""
    stride: int | None = None
    """Tokens that neighbouring windows share; None: as the model is configured."""
    priority: Priority = "interactive"
    timeout_s: float | None = None
    """Seconds from now on that the client gives it; None: as the server is configured."""
    usage: Usage = field(default_factory=Usage, compare=False)
    """What computing it has cost so far."""


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """One request's part of a call to a tokenizer replica."""

    inputs: tuple[TextInput, ...]
    long_texts: LongTexts
    truncation_side: Side = "right"
    prompt: str = ""
    """Put before every text (not before token ids)."""
    stride: int = 0
    """Tokens that neighbouring windows of one input share."""
    cut: Literal["longest_first", "only_first", "only_second"] = "longest_first"
    """Which text of a pair is cut, or read in windows while the other is repeated in each."""
    max_tokens: int | None = None
    """A lower limit than the model's, special tokens included."""
    align: bool = False
    """Whether `TokenBatch.alignment` is wanted."""
    max_windows: int = 512
    """Most windows of inputs that need more than one, of all inputs together; beyond it the request is refused."""
    computed: bool = True
    """Whether the model is to compute them: a token that it does not know is then refused."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a replica has loaded, so that replicas of two tiers are never put together by mistake.

    `fingerprint` changes with the files, the model's configuration or the software; `revision` is for people.
    """

    fingerprint: str
    revision: str

    def check(self, fingerprint: str) -> None:
        """Raises VersionGoneError unless a call is meant for a replica of this version."""
        if fingerprint != self.fingerprint:
            raise VersionGoneError(f"this replica has version {self.fingerprint}, and the call is for {fingerprint}")


@dataclass(frozen=True, slots=True)
class VersionCall:
    """A call without arguments of its own, to a replica of one version."""

    version: str


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """One coalesced batch for a tokenizer replica of one version."""

    requests: tuple[TokenizeRequest, ...]
    version: str
    id: str = ""
    """By which the replica that has the call can be found while it is under way."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where tokens stand in their texts, which tasks with positions in their answers need.

    `offsets` (total, 2) int32: first and last-plus-one character, in the text as it was sent (without the prompt);
    `word_ids` (total,) int32: the tokenizer's word, -1 for special tokens; `text_ids` (total,) int8: 0 for the first
    text of an input, 1 for the second, -1 for special tokens.
    """

    offsets: Int32Array
    word_ids: Int32Array
    text_ids: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The sequences of `m` requests, flat and without padding.

    `input_ids` (total,) int32; `cu_seqlens` (n + 1,) int32, where each sequence starts and the last one ends;
    `cu_requests` (m + 1,) int32, the same over sequences, for requests; `token_type_ids` (total,) int32 or None
    where all are zero; `truncated` (n,) bool. A request in `failures` (by index) has no sequences.
    `input_of` (n,) int32 is the index of the input, within its request, that a sequence is a window of; None where
    each input is one sequence. `alignment` is there where a request asked for it; it does not go to a model replica.
    """

    input_ids: Int32Array
    cu_seqlens: Int32Array
    cu_requests: Int32Array
    truncated: npt.NDArray[np.bool_]
    token_type_ids: Int32Array | None = None
    failures: Mapping[int, ServeAppError] = field(default_factory=dict)
    tokenize_s: float = 0.0
    input_of: Int32Array | None = None
    alignment: Alignment | None = None

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
            input_of=None if self.input_of is None else self.input_of[first:last],
            alignment=None if self.alignment is None else _aligned(self.alignment, start, stop),
        )

    def of_request(self, request: int) -> TokenBatch:
        """One request's sequences as a batch; views, no copies."""
        rows = self.sequences_of(request)
        return self.select(rows.start, rows.stop)

    def for_model(self) -> TokenBatch:
        """Without what a model replica has no use for."""
        return replace(self, alignment=None, input_of=None)

    def without(self, requests: Collection[int]) -> TokenBatch:
        """The same requests, but `requests` (by index) have no sequences any more."""
        counts = np.diff(self.cu_requests)
        stays = np.repeat(~np.isin(np.arange(self.num_requests), list(requests)), counts)
        counts[list(requests)] = 0
        tokens = np.repeat(stays, self.lengths())
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            cu_seqlens=_cumulative(self.lengths()[stays]),
            cu_requests=_cumulative(counts),
            truncated=self.truncated[stays],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            input_of=None if self.input_of is None else self.input_of[stays],
            alignment=None if self.alignment is None else _chosen(self.alignment, tokens),
        )


def _aligned(alignment: Alignment, start: int, stop: int) -> Alignment:
    return Alignment(alignment.offsets[start:stop], alignment.word_ids[start:stop], alignment.text_ids[start:stop])


def _chosen(alignment: Alignment, tokens: npt.NDArray[np.bool_]) -> Alignment:
    return Alignment(alignment.offsets[tokens], alignment.word_ids[tokens], alignment.text_ids[tokens])


def concatenate(batches: list[TokenBatch]) -> TokenBatch:
    """One batch with the sequences of all, in order; its requests are the requests of all, failures aside.

    For the device: windows and alignments are left out.

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
    return _cumulative(np.concatenate([np.diff(c) for c in cumulative]))


def _cumulative(counts: Int32Array) -> Int32Array:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])


def _types_or_zeros(batches: list[TokenBatch]) -> Iterator[Int32Array]:
    for batch in batches:
        yield np.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids


@dataclass(frozen=True, slots=True)
class MaskArguments:
    """What the head of fill-mask needs to know of one request; `targets` are token ids."""

    top_k: int
    targets: tuple[int, ...] = ()


HeadArguments: TypeAlias = MaskArguments
"""What a head may need to know of a request, beside its tokens."""


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
    arguments: tuple[HeadArguments | None, ...] = ()
    """(m,), or empty where the head needs none."""
    version: str = ""
    """Fingerprint of the replicas that made `tokens`; only a model replica of the same one computes them."""
    id: str = ""
    """By which some of its requests can be taken back while it is under way (Forget); empty if they cannot."""
    goes_first: bool = False
    """Whether it goes before what waits at the replica: it has waited at another one, which was lost."""

    @property
    def weight(self) -> int:
        """Tokens, by which calls are spread over replicas."""
        return len(self.tokens.input_ids)


@dataclass(frozen=True, slots=True)
class Forget:
    """Requests (by index) of a ForwardCall that nobody waits for any more; for the replica that has the call."""

    call_id: str
    requests: tuple[int, ...]

    @property
    def weight(self) -> int:
        """Nothing, where calls are spread over replicas."""
        return 0


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """One prompt for a replica that generates: `input_ids` (p,) int32."""

    input_ids: Int32Array
    options: GenerationOptions
    time_left_s: float | None = None
    """Seconds left when the call is sent; None for no limit."""
    priority: Priority = "interactive"
    version: str = ""
    """Fingerprint of the replica that made `input_ids`; only a model replica of the same one computes them."""
    id: str = ""
    """By which the replica that has the call can be found while it is under way."""

    @property
    def weight(self) -> int:
        """Tokens, by which calls are spread over replicas; new ones count, as far as they are known."""
        return len(self.input_ids) + (self.options.max_new_tokens or 0)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the head left of each sequence: `values` (r, d) float32, `queue_s` and `forward_s` (m,) float64.

    `cu_rows` (n + 1,) int32 says where each sequence's rows start and the last one's end; None where each sequence has
    one row. A request in `failures` (by index) failed alone; its rows are zeros, or none where `cu_rows` is given.
    """

    values: FloatArray
    queue_s: npt.NDArray[np.float64]
    forward_s: npt.NDArray[np.float64]
    failures: Mapping[int, ServeAppError] = field(default_factory=dict)
    cu_rows: Int32Array | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """One request after the model: its sequences, and what the head left of each.

    `values` (r, d) float32; `cu_rows` as in Rows, starting at 0.
    """

    tokens: TokenBatch
    values: FloatArray
    cu_rows: Int32Array | None = None

    def of_sequence(self, sequence: int) -> FloatArray:
        """The rows of one sequence, (k, d) float32."""
        if self.cu_rows is None:
            return self.values[sequence : sequence + 1]
        return self.values[self.cu_rows[sequence] : self.cu_rows[sequence + 1]]

    def windows(self) -> list[list[int]]:
        """The sequences of each input, in order."""
        if self.tokens.input_of is None:
            return [[i] for i in range(self.tokens.num_sequences)]
        found: list[list[int]] = [[] for _ in range(int(self.tokens.input_of.max(initial=-1)) + 1)]
        for sequence, index in enumerate(self.tokens.input_of.tolist()):
            found[index].append(sequence)
        return found


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

    output: TaskOutput
    tokens: int
    timings: Timings
    truncated: int = 0
    """How many of the inputs were cut."""
    windows: int = 0
    """How many windows were computed for inputs that needed more than one."""
    version: Version | None = None
    """What computed it; None where no model did."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a model's generation config says where a request does not; None where neither does."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    """Of all that the decoder holds, and never of what an encoder reads."""
    num_beams: int = 1


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
    long_texts: LongTexts = "truncate"
    """Where a request does not say."""
    truncation_side: Side | None = None
    """Where a request does not say; None where neither the configuration nor the tokenizer's files do."""
    stride: int = 0
    """Tokens that neighbouring windows share where a request does not say."""
    labels: tuple[str, ...] = ()
    """Names of the classes, by index (`id2label`)."""
    problem_type: str | None = None
    """Of a classifier, from its config: regression, single_label_classification, multi_label_classification."""
    default_function: str | None = None
    """`function_to_apply` of the model's config."""
    activation: Activation = "sigmoid"
    """Of a model with one label, for reranking."""
    padding_side: Side = "right"
    """The tokenizer's; of one that pads on the left, question answering reads the context first."""
    mask_token_id: int | None = None
    cls_token_id: int | None = None
    can_chat: bool = False
    """The tokenizer has a chat template."""
    turn_end_ids: tuple[int, ...] = ()
    """Tokens that end a turn of a conversation, by the tokenizer's own files."""
    task_prefixes: Mapping[str, str] = field(default_factory=dict)
    """What texts begin with, by task, from `task_specific_params` of the model's config (T5: "summarize: ")."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    tokenizer_threads: int = 1
    """Calls that one tokenizer replica of the model tokenizes at once."""
    generation: GenerationDefaults = GenerationDefaults()
    """Of models that generate."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a model replica says of itself, for `/info`."""

    dtype: str
    device: str
    attention: str
    """"packed" or, with the reason, "bucketed: …"."""
    max_batch_tokens: int
    memory: Mapping[str, float] = field(default_factory=dict)

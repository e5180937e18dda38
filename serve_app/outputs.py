"""What tasks answer, before a protocol writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label of a text."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Entity:
    """A token or a group of tokens with its label; `start` and `end` in characters of the text.

    `index` is the token's place in its sequence, where tokens are not aggregated.
    """

    label: str
    score: float
    word: str
    start: int
    end: int
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Fill:
    """A token in a mask's place, and the text with it."""

    score: float
    token: int
    token_str: str
    sequence: str


@dataclass(frozen=True, slots=True)
class Span:
    """An answer within its context; `start` and `end` in characters."""

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well each document answers a query.

    `scores` (n,) float32 are in the order of the documents. `order` (n,) holds indices, the best document's first; it
    tells apart what a function has squashed into equal scores.
    """

    scores: FloatArray
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SparseVector:
    """`indices` (k,) int32 ascending, `values` (k,) float32."""

    indices: Int32Array
    values: FloatArray


FinishReason: TypeAlias = Literal["stop", "length"]
"""An end token or a stop text, or the limit of new tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability; `top` are the most likely ones at its place, most likely first."""

    token: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    part: bytes | None = None
    """The token's bytes, where they are no whole characters, so that `text` cannot tell them."""

    @property
    def own_bytes(self) -> bytes:
        return self.text.encode() if self.part is None else self.part


@dataclass(frozen=True, slots=True)
class Generated:
    """One input's whole answer; `tokens` are the new ones, an end token included."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    """Characters of `text` that are there before each token of `logprobs`."""


@dataclass(frozen=True, slots=True)
class GeneratedPiece:
    """A part of an answer that is streamed: all pieces' `text` makes the whole. The last one has a `finish_reason`.

    `token` is None where a piece only completes text that was held back (half a character, the start of a stop text).
    """

    text: str
    token: int | None = None
    special: bool = False
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    truncated: bool = False
    """Whether the prompt was cut, which the first piece tells."""
    choice: int = 0
    """Which answer to the input it is of, where there are several."""
    revision: str = ""
    """The revision of the model that makes the answer, which the first piece tells an ingress's clients."""


TaskOutput: TypeAlias = (
    FloatArray
    | tuple[FloatArray, ...]
    | tuple[SparseVector, ...]
    | tuple[tuple[LabelScore, ...], ...]
    | tuple[tuple[Entity, ...], ...]
    | tuple[tuple[tuple[Fill, ...], ...], ...]
    | tuple[tuple[Span, ...], ...]
    | tuple[Generated, ...]
    | Ranking
)
"""By task: embedding (n, d) and similarity (n - 1,): an array. rerank: a ranking of n - 1 documents. token-embedding:
an array (tokens, d) for each input. sparse-embedding: vectors. text-classification, zero-shot-classification: for each
input its labels, best first. token-classification: for each input its entities. fill-mask: for each input, for each
mask, the fills. question-answering: for each input its spans, best first. Generating tasks: for each input its text."""

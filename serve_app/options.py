"""What a client may choose, task by task; None means what the model's own files or its configuration say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from serve_app.errors import InvalidInputError

OPTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""What the name of an option looks like. Nothing else that a client made up comes back to it in an error."""

DEFAULT_TEMPLATE = "This example is {}."


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


@dataclass(frozen=True, slots=True)
class TokenEmbeddingOptions:
    """One vector for each token (feature extraction without pooling), special tokens included."""

    prompt_name: str | None = None


@dataclass(frozen=True, slots=True)
class SparseEmbeddingOptions:
    """SPLADE: a weight for each vocabulary entry that counts; `prompt_name` as for embeddings."""

    prompt_name: str | None = None


@dataclass(frozen=True, slots=True)
class ClassificationOptions:
    """Labels of texts or pairs. `top_k` None is all labels; `function` None is what the model's config asks for."""

    top_k: int | None = None
    function: Literal["sigmoid", "softmax", "none"] | None = None
    over_windows: Literal["max", "mean"] = "mean"


@dataclass(frozen=True, slots=True)
class RerankOptions:
    """The first input is the query, the others are documents. `raw_scores`: logits instead of probabilities."""

    raw_scores: bool = False


@dataclass(frozen=True, slots=True)
class ZeroShotOptions:
    """Labels for texts by entailment; `template` has the label's place: one `{}`, or `{0}` as often as it likes."""

    labels: tuple[str, ...]
    multi_label: bool = False
    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        """Raises InvalidInputError for a template without one place for the label, or with other braces."""
        place = self._place
        one = self.template.count(place) == 1 or place == "{0}"
        if not one or set(self.template.replace(place, "")) & set("{}"):
            raise InvalidInputError("`hypothesis_template` must have one {}, where the label goes, and no other braces")

    @property
    def _place(self) -> str:
        return "{0}" if "{0}" in self.template else "{}"

    def hypothesis(self, label: str) -> str:
        """The template with the label in its place. Nothing else is filled in: `format` would run what it is sent."""
        return self.template.replace(self._place, label)


@dataclass(frozen=True, slots=True)
class TokenClassificationOptions:
    """`aggregation` as in transformers' pipeline."""

    aggregation: Literal["none", "simple", "first", "average", "max"] = "none"
    ignore_labels: tuple[str, ...] = ("O",)


@dataclass(frozen=True, slots=True)
class FillMaskOptions:
    """The most likely tokens at each mask, or the scores of `targets` alone."""

    top_k: int = 5
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class QuestionAnsweringOptions:
    """Inputs are (question, context) pairs; lengths in tokens. None: as transformers 4.57's pipeline would."""

    top_k: int = 1
    doc_stride: int | None = None
    max_seq_len: int | None = None
    max_answer_len: int = 15
    max_question_len: int = 64
    handle_impossible_answer: bool = False
    align_to_words: bool = True


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How text is generated; None is what the model's generation config says, else transformers' default."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    renormalize_logits: bool | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    max_length: int | None = None
    """Of prompt and answer together; what an encoder reads does not count. `max_new_tokens` wins."""
    min_length: int | None = None
    prompt_tokens: int | None = None
    """Most tokens of the prompt, special tokens included; what is more is cut."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends; none of them is part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens at which an answer ends, beside those of the generation config."""
    ignore_eos: bool = False
    """Whether an answer goes on beyond the generation config's end tokens."""
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    n: int = 1
    """Answers to each input, which are made one by one: the first with `seed`, the next with `seed` + 1, and so on."""
    logprobs: int | None = None
    """Log probabilities of so many most likely tokens at each step, beside that of the chosen one."""
    echo: bool = False
    """Put the prompt before the answer."""
    source_language: str | None = None
    target_language: str | None = None


TaskOptions: TypeAlias = (
    EmbeddingOptions
    | SimilarityOptions
    | TokenEmbeddingOptions
    | SparseEmbeddingOptions
    | ClassificationOptions
    | RerankOptions
    | ZeroShotOptions
    | TokenClassificationOptions
    | FillMaskOptions
    | QuestionAnsweringOptions
    | GenerationOptions
)

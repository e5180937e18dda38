"""Text generation, summarization, translation and text to text: what is tokenized, and what the answer is.

What is generated, and how, is the model replica's part; nothing here is a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from serve_app.errors import InvalidInputError, MalformedRequestError
from serve_app.options import GenerationOptions
from serve_app.outputs import Generated, GeneratedPiece
from serve_app.tasks.inputs import truncation_side_of
from serve_app.types import Chat, ModelCard, Request, TokenizeRequest

DEFAULT_NEW_TOKENS = 256
"""New tokens of an answer where neither the request nor the model's files say; what transformers' pipelines take."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Stateless; one instance serves every request of its task."""

    name: str
    encodes: bool
    """Whether the prompt is read by an encoder, so that prompt and answer do not share one window."""

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        """What to tokenize. Raises RequestError if the request makes no sense for this model."""
        options = request.options
        if not isinstance(options, GenerationOptions):
            raise MalformedRequestError(f"task {self.name} takes generation options")
        self._check(request, card, options)
        long_texts = request.long_texts or ("error" if card.long_texts == "error" else "truncate")
        return TokenizeRequest(
            inputs=request.inputs,
            long_texts=long_texts,
            truncation_side=truncation_side_of(request, card, "right" if self.encodes else "left"),
            prompt=self._prefix(card, options),
            max_tokens=self._prompt_limit(card, options, long_texts == "truncate"),
        )

    def _prompt_limit(self, card: ModelCard, options: GenerationOptions, cut: bool) -> int | None:
        """Most tokens of what is read; None: as many as the model takes. Raises InvalidInputError."""
        limit = None if self.encodes else _room_for_prompt(card, options, cut)
        asked = options.prompt_tokens
        if asked is None:
            return limit
        if asked > card.max_input_tokens:
            raise InvalidInputError(f"truncate: must be 1 to {card.max_input_tokens}, which model {card.name} takes")
        return asked if limit is None else min(asked, limit)

    def _check(self, request: Request, card: ModelCard, options: GenerationOptions) -> None:
        if request.long_texts == "windows":
            raise InvalidInputError(f"windows: task {self.name} reads a text at once; ask for truncation or an error")
        if any(isinstance(value, Chat) for value in request.inputs):
            if not card.can_chat:
                raise InvalidInputError(f"model {card.name} has no chat template; send a text")
            if self.encodes:
                raise InvalidInputError(f"task {self.name} takes texts, not conversations")
        if any(isinstance(value, tuple) and value and isinstance(value[0], str) for value in request.inputs):
            raise InvalidInputError(f"task {self.name} takes single texts, not pairs")
        if options.n > 1 and beams_of(options, card) > 1:
            raise InvalidInputError("n: beams come to one answer; ask for one, or set num_beams to 1")
        if options.echo and self.encodes:
            raise InvalidInputError(f"echo: task {self.name} answers with another text; it cannot repeat its input")

    def _prefix(self, card: ModelCard, options: GenerationOptions) -> str:
        """What the model was trained to see before a text of this task, as its own files say."""
        if self.name != "translation":
            return card.task_prefixes.get(self.name, "")
        if card.model_type == "marian":
            return f">>{options.target_language}<< " if options.target_language else ""
        return _translation_prefix(card, options)


def _translation_prefix(card: ModelCard, options: GenerationOptions) -> str:
    pairs = {task: prefix for task, prefix in card.task_prefixes.items() if task.startswith("translation")}
    if not pairs:
        return ""
    if options.source_language is None and options.target_language is None:
        if len(pairs) == 1:
            return next(iter(pairs.values()))
        raise InvalidInputError(f"source_language and target_language: choose one of {_known(pairs)}")
    wanted = f"translation_{options.source_language}_to_{options.target_language}"
    if wanted not in pairs:
        raise InvalidInputError(f"source_language and target_language: this model translates {_known(pairs)}")
    return pairs[wanted]


def _known(pairs: Mapping[str, str]) -> str:
    return ", ".join(sorted(task.removeprefix("translation_").replace("_to_", " to ") for task in pairs))


def most_new_tokens(request: Request, card: ModelCard, prompt_tokens: int) -> int:
    """Most tokens of the answer to one prompt of so many tokens.

    By the rule of the model replica (`serve_app.model.generation.sampling.new_tokens`), within the model's window.
    """
    options, own, encodes = request.options, card.generation, GENERATING[request.task].encodes
    assert isinstance(options, GenerationOptions)
    before = 1 if encodes else prompt_tokens
    new = options.max_new_tokens or own.max_new_tokens
    if new is None:
        longest = options.max_length or own.max_length
        new = DEFAULT_NEW_TOKENS if longest is None else longest - before
    room = card.max_input_tokens - before
    return max(1, min(new, room))


def beams_of(options: GenerationOptions, card: ModelCard) -> int:
    """Sequences that are computed side by side for one answer."""
    return options.num_beams or card.generation.num_beams


def speaks_by_prefix(card: ModelCard) -> bool:
    """Whether languages are chosen by what is written before the text, and not by tokens of their own."""
    return card.model_type == "marian" or any(task.startswith("translation") for task in card.task_prefixes)


def _room_for_prompt(card: ModelCard, options: GenerationOptions, cut: bool) -> int:
    """Tokens of a prompt for which the window has room. A prompt that is cut leaves room for the answer that was asked
    for, up to a quarter of the window; where it is refused instead, one new token is enough.
    """
    window = card.max_input_tokens
    wanted = (options.max_new_tokens or DEFAULT_NEW_TOKENS) if cut else 1
    return max(1, window - max(1, min(wanted, window // 4)))


def collected(pieces: Sequence[GeneratedPiece]) -> Generated:
    """All pieces of one answer as a whole."""
    reason = pieces[-1].finish_reason
    assert reason is not None, "the last piece says why it is the last"
    starts = accumulate((len(piece.text) for piece in pieces), initial=0)
    return Generated(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces if piece.token is not None),
        finish_reason=reason,
        logprobs=tuple(piece.logprob for piece in pieces if piece.logprob is not None),
        offsets=tuple(start for start, piece in zip(starts, pieces, strict=False) if piece.logprob is not None),
    )


GENERATING: Mapping[str, Generation] = {
    task.name: task
    for task in (
        Generation("text-generation", encodes=False),
        Generation("text2text-generation", encodes=True),
        Generation("summarization", encodes=True),
        Generation("translation", encodes=True),
    )
}
"""Tasks whose answers are generated, by name."""

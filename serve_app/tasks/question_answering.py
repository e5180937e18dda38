"""Extractive question answering, by the rules of the pipeline that transformers had up to version 4.57.

Inputs are (question, context) pairs; a long context is read in windows, each with the question. In each window start
and end of an answer are softmaxes over the context's tokens and the first one, which stands for no answer. The score
of a span is the product of both; the best spans are widened to words, and the scores of equal answers are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from serve_app.errors import EmptyInputError, InvalidInputError
from serve_app.options import QuestionAnsweringOptions
from serve_app.outputs import Span
from serve_app.tasks.inputs import options_of, pairs_of, truncation_side_of
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, Int32Array, LongTexts, ModelCard, Request, TokenizeRequest

MAX_SEQ_LEN = 384
MAX_STRIDE = 128
_MASKED = np.float32(-10000.0)


class QuestionAnswering:
    name = "question-answering"
    head = "span-logits"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, QuestionAnsweringOptions)
        _check(request, options)
        longest = min(card.max_input_tokens, options.max_seq_len or MAX_SEQ_LEN)
        return TokenizeRequest(
            inputs=request.inputs,
            long_texts=_long_texts(request, card),
            truncation_side=truncation_side_of(request, card),
            stride=_stride(request, options, longest),
            cut="only_second",
            max_tokens=longest,
            align=True,
        )

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[tuple[Span, ...], ...]:
        """For each pair its answers, best first."""
        options = options_of(request, QuestionAnsweringOptions)
        return tuple(
            _answers(context, [_window(features, card, sequence) for sequence in sequences], options)
            for (_, context), sequences in zip(pairs_of(request), features.windows(), strict=True)
        )


@dataclass(frozen=True, slots=True)
class _Window:
    """One window: probabilities (k,) of an answer's start and end, and where its tokens stand."""

    start: FloatArray
    end: FloatArray
    no_answer: float
    words: list[int]
    """The word of each token; -1 outside the context, and where a token is of no word."""
    offsets: Int32Array


def _check(request: Request, options: QuestionAnsweringOptions) -> None:
    for index, (question, context) in enumerate(pairs_of(request)):
        if not question or not context:
            raise EmptyInputError(f"inputs[{index}]: {'context' if question else 'question'} is empty")
    for name in ("top_k", "max_answer_len"):
        if getattr(options, name) < 1:
            raise InvalidInputError(f"{name}: must be at least 1")
    if options.max_seq_len is not None and options.max_seq_len < 1:
        raise InvalidInputError("max_seq_len: must be at least 1")


def _long_texts(request: Request, card: ModelCard) -> LongTexts:
    """Windows, as the pipeline does, where neither the request nor the configuration asks for a refusal or a cut."""
    return request.long_texts or ("error" if card.long_texts == "error" else "windows")


def _stride(request: Request, options: QuestionAnsweringOptions, longest: int) -> int:
    asked = options.doc_stride if options.doc_stride is not None else request.stride
    return min(longest // 2, MAX_STRIDE) if asked is None else asked


def _window(features: Features, card: ModelCard, sequence: int) -> _Window:
    tokens = features.tokens.select(sequence, sequence + 1)
    assert tokens.alignment is not None
    allowed = tokens.alignment.text_ids == 1
    if card.cls_token_id is not None:
        allowed = allowed | (tokens.input_ids == card.cls_token_id)
    logits = features.of_sequence(sequence)
    start, end = (_softmax(np.where(allowed, logits[:, column], _MASKED)) for column in (0, 1))
    no_answer = float(start[0] * end[0])
    start[0] = end[0] = 0.0
    words = np.where(tokens.alignment.text_ids == 1, tokens.alignment.word_ids, -1).tolist()
    return _Window(start, end, no_answer, words, tokens.alignment.offsets)


def _softmax(logits: FloatArray) -> FloatArray:
    powers = np.exp(logits - logits.max()).astype(np.float32)
    scores: FloatArray = powers / powers.sum()
    return scores


def _answers(context: str, windows: list[_Window], options: QuestionAnsweringOptions) -> tuple[Span, ...]:
    found: dict[str, Span] = {}
    for window in windows:
        for start, end, score in _best_spans(window, options):
            first, last = _characters(window, start, end, options.align_to_words)
            answer = context[first:last]
            same = found.get(answer.lower(), Span(answer, 0.0, first, last))
            found[answer.lower()] = Span(same.answer, same.score + score, same.start, same.end)
    spans = list(found.values())
    if options.handle_impossible_answer:
        spans.append(Span("", min(window.no_answer for window in windows), 0, 0))
    return tuple(sorted(spans, key=lambda span: -span.score)[: options.top_k])


def _best_spans(window: _Window, options: QuestionAnsweringOptions) -> Iterator[tuple[int, int, float]]:
    """Spans of tokens and their scores, best first; more than are asked for, because words make some of them equal.

    Spans are at most `max_answer_len` tokens, so a band of (k, max_answer_len) products holds all of them.
    """
    length = len(window.start)
    reach = min(options.max_answer_len, length)
    ends = np.lib.stride_tricks.sliding_window_view(np.pad(window.end, (0, reach - 1)), reach)
    scores = (window.start[:, None] * ends).ravel()
    wanted = min(options.top_k * 2 + 10, len(scores))
    chosen = np.argpartition(-scores, wanted - 1)[:wanted]
    for place in chosen[np.lexsort((chosen, -scores[chosen]))].tolist():
        start, end = place // reach, place // reach + place % reach
        if scores[place] > 0.0:  # which it is not where padding was, before or on a masked token
            yield start, end, float(scores[place])


def _characters(window: _Window, start: int, end: int, align_to_words: bool) -> tuple[int, int]:
    """First and last-plus-one character of a span of tokens, or of the words it touches, as far as this window goes."""
    words, first, last = window.words, start, end
    if align_to_words and words[start] >= 0 and words[end] >= 0:
        first = words.index(words[start])
        last = len(words) - 1 - words[::-1].index(words[end])
    return int(window.offsets[first, 0]), int(window.offsets[last, 1])

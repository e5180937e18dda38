"""Extractive question answering, by the rules of the pipeline that transformers had up to version 4.57.

Inputs are (question, context) pairs; a long context is read in windows, each with the question. The model reads the
question first, or the context where its tokenizer pads on the left (XLNet, Llama). In each window start
and end of an answer are softmaxes over the context's tokens and the CLS token, which stands for no answer. The score
of a span is the product of both; the best spans are widened to words, and the scores of equal answers are added up.

Where the context comes first, that pipeline leaves no token out, the question's neither (`tok != 1 if question_first
else 0` is 0 for all). So a span may begin or end there; its place is then told as if it were in the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.errors import EmptyInputError, InvalidInputError
from serve_app.options import QuestionAnsweringOptions
from serve_app.outputs import Span
from serve_app.tasks.inputs import options_of, pairs_of, truncation_side_of
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, Int32Array, LongTexts, ModelCard, Request, TokenizeRequest

Places: TypeAlias = npt.NDArray[np.intp]

MAX_SEQ_LEN = 384
MAX_STRIDE = 128
_MASKED = np.float32(-10000.0)

MOST_ANSWERS = 1000
"""To one question."""

MOST_CANDIDATES = 20_000
"""`top_k` times the windows of a request: the spans that are looked at are about twice as many."""

_MOST_PRODUCTS = 1 << 22
"""Spans whose scores are computed at once, for one window: 16 MiB."""


class QuestionAnswering:
    name = "question-answering"
    head = "span-logits"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, QuestionAnsweringOptions)
        longest = min(card.max_input_tokens, options.max_seq_len or MAX_SEQ_LEN)
        _check(request, options)
        _check_products(options, longest)
        context = _context_place(card)
        return TokenizeRequest(
            inputs=request.inputs if context else tuple(pair[::-1] for pair in pairs_of(request)),
            long_texts=_long_texts(request, card),
            truncation_side=truncation_side_of(request, card),
            stride=_stride(request, options, longest),
            cut="only_second" if context else "only_first",
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
        _check_candidates(options, features.tokens.num_sequences)
        return tuple(
            _answers(context, [_window(features, card, sequence) for sequence in sequences], options)
            for (_, context), sequences in zip(pairs_of(request), features.windows(), strict=True)
        )


def _context_place(card: ModelCard) -> int:
    """0 or 1: the text of a pair that is the context."""
    return 0 if card.padding_side == "left" else 1


@dataclass(frozen=True, slots=True)
class _Window:
    """One window: probabilities (k,) of an answer's start and end, and where its tokens stand."""

    start: FloatArray
    end: FloatArray
    no_answer: float
    words: Int32Array
    """The word of each token within its text; -1 where a token is of no word."""
    of_context: npt.NDArray[np.bool_]
    offsets: Int32Array


def _check(request: Request, options: QuestionAnsweringOptions) -> None:
    for index, (question, context) in enumerate(pairs_of(request)):
        if not question or not context:
            raise EmptyInputError(f"inputs[{index}]: {'context' if question else 'question'} is empty")
    for name in ("top_k", "max_answer_len"):
        if getattr(options, name) < 1:
            raise InvalidInputError(f"{name}: must be at least 1")
    if options.top_k > MOST_ANSWERS:
        raise InvalidInputError(f"top_k: must be at most {MOST_ANSWERS}")
    if options.max_seq_len is not None and options.max_seq_len < 1:
        raise InvalidInputError("max_seq_len: must be at least 1")
    _check_candidates(options, len(request.inputs))


def _check_products(options: QuestionAnsweringOptions, longest: int) -> None:
    if longest * min(options.max_answer_len, longest) > _MOST_PRODUCTS:
        raise InvalidInputError(
            f"max_answer_len: must be at most {_MOST_PRODUCTS // longest} in windows of {longest} tokens; "
            "lower it or max_seq_len"
        )


def _check_candidates(options: QuestionAnsweringOptions, windows: int) -> None:
    if options.top_k * windows > MOST_CANDIDATES:
        raise InvalidInputError(
            f"top_k: {options.top_k} answers in each of {windows} windows are more than {MOST_CANDIDATES}; "
            "ask for fewer answers, or send less text"
        )


def _long_texts(request: Request, card: ModelCard) -> LongTexts:
    """Windows, as the pipeline does, where neither the request nor the configuration asks for a refusal or a cut."""
    return request.long_texts or ("error" if card.long_texts == "error" else "windows")


def _stride(request: Request, options: QuestionAnsweringOptions, longest: int) -> int:
    asked = options.doc_stride if options.doc_stride is not None else request.stride
    return min(longest // 2, MAX_STRIDE) if asked is None else asked


def _window(features: Features, card: ModelCard, sequence: int) -> _Window:
    tokens = features.tokens.select(sequence, sequence + 1)
    assert tokens.alignment is not None
    place = _context_place(card)
    of_context = tokens.alignment.text_ids == place
    allowed = of_context if place == 1 else np.ones_like(of_context)
    if card.cls_token_id is not None:
        allowed = allowed | (tokens.input_ids == card.cls_token_id)
    logits = features.of_sequence(sequence)
    start, end = (_softmax(np.where(allowed, logits[:, column], _MASKED)) for column in (0, 1))
    no_answer = float(start[0] * end[0])
    start[0] = end[0] = 0.0
    return _Window(start, end, no_answer, tokens.alignment.word_ids, of_context, tokens.alignment.offsets)


def _softmax(logits: FloatArray) -> FloatArray:
    powers = np.exp(logits - logits.max()).astype(np.float32)
    scores: FloatArray = powers / powers.sum()
    return scores


def _answers(context: str, windows: list[_Window], options: QuestionAnsweringOptions) -> tuple[Span, ...]:
    found: dict[str, Span] = {}
    for window in windows:
        starts, ends, scores = _best_spans(window, options)
        firsts, lasts = _characters(window, starts, ends, options.align_to_words)
        for first, last, score in zip(firsts, lasts, scores.tolist(), strict=True):
            answer = context[first:last]
            same = found.get(answer.lower(), Span(answer, 0.0, first, last))
            found[answer.lower()] = Span(same.answer, same.score + score, same.start, same.end)
    spans = list(found.values())
    if options.handle_impossible_answer:
        spans.append(Span("", min(window.no_answer for window in windows), 0, 0))
    return tuple(sorted(spans, key=lambda span: -span.score)[: options.top_k])


def _best_spans(window: _Window, options: QuestionAnsweringOptions) -> tuple[Places, Places, FloatArray]:
    """First and last tokens of spans and their scores, best first.

    Spans are at most `max_answer_len` tokens, so a band of (k, max_answer_len) products holds all of them.
    """
    length = len(window.start)
    reach = min(options.max_answer_len, length)
    ends = np.lib.stride_tricks.sliding_window_view(np.pad(window.end, (0, reach - 1)), reach)
    scores = (window.start[:, None] * ends).ravel()
    most = options.top_k * 2 + 10 if options.align_to_words else options.top_k  # words make some of them equal
    wanted = min(most, len(scores))
    chosen = np.argpartition(-scores, wanted - 1)[:wanted]
    chosen = chosen[np.lexsort((chosen, -scores[chosen]))]
    chosen = chosen[scores[chosen] > 0.0]  # which it is not where padding was, before or on a masked token
    return chosen // reach, chosen // reach + chosen % reach, scores[chosen]


def _characters(window: _Window, starts: Places, ends: Places, align_to_words: bool) -> tuple[list[int], list[int]]:
    """First and last-plus-one characters of spans of tokens, or of the words they touch, as far as this window goes.

    A word is looked up in the context by its number, as the pipeline does. Spans of other tokens are not widened.
    """
    firsts, lasts = starts, ends
    context = np.flatnonzero(window.of_context & (window.words >= 0))
    if align_to_words and context.size:
        words = window.words[context]
        known, first_of = np.unique(words, return_index=True)
        last_of = len(words) - 1 - np.unique(words[::-1], return_index=True)[1]
        begun, ended = (np.searchsorted(known, window.words[each]).clip(max=len(known) - 1) for each in (starts, ends))
        whole = (known[begun] == window.words[starts]) & (known[ended] == window.words[ends])
        firsts = np.where(whole, context[first_of[begun]], starts)
        lasts = np.where(whole, context[last_of[ended]], ends)
    return window.offsets[firsts, 0].tolist(), window.offsets[lasts, 1].tolist()

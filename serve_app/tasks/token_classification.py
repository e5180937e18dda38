"""Token classification (named entities, parts of speech), as transformers' pipeline of that name.

Steps: a softmax for each token; tokens joined to words as the strategy says (`none` and `simple` do not); words
with the same tag after each other joined to groups (`none` does not); labels that are to be ignored dropped.

A text in windows goes through this window by window, and of groups that overlap the longest stays, then the one with
the highest score; with `none`, each token is taken from the window in which it has more around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.errors import InvalidInputError
from serve_app.options import TokenClassificationOptions
from serve_app.outputs import Entity
from serve_app.tasks.inputs import options_of, stride_of, texts_of, tokenize_request
from serve_app.tasks.scores import softmax
from serve_app.tasks.stitching import Places, token_places
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenBatch, TokenizeRequest

Aggregation: TypeAlias = Literal["none", "simple", "first", "average", "max"]
Flags: TypeAlias = npt.NDArray[np.bool_]

MOST_IGNORED = 1000
"""Labels that a request may ignore; no model has more."""


@dataclass(frozen=True, slots=True)
class _Token:
    """One token of a text; `scores` (labels,)."""

    word: str
    scores: FloatArray
    best: int
    """The label that has the highest of the scores."""
    score: float
    start: int
    end: int
    index: int
    is_subword: bool


@dataclass(frozen=True, slots=True)
class _Tagged:
    """A token or a word with its label."""

    label: str
    score: float
    tokens: Sequence[_Token]


class TokenClassification:
    name = "token-classification"
    head = "token-logits"
    needs_vocabulary = True

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        ignored = len(options_of(request, TokenClassificationOptions).ignore_labels)
        if ignored > MOST_IGNORED:
            raise InvalidInputError(f"ignore_labels: has {ignored} labels, and {MOST_IGNORED} are allowed")
        texts_of(request)
        return replace(tokenize_request(request, card), align=True)

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[tuple[Entity, ...], ...]:
        """For each input its entities, in the order of the text."""
        options = options_of(request, TokenClassificationOptions)
        assert vocabulary is not None
        ignored = frozenset(options.ignore_labels)
        scores = softmax(features.values)
        unread = _unread(scores, options, ignored, card.labels)
        answers = []
        for text, sequences in zip(texts_of(request), features.windows(), strict=True):
            reader = _Reader(text, features.tokens, scores, vocabulary, unread)
            if options.aggregation == "none":
                places = [token_places(features.tokens, sequences, stride_of(request, card))]
            else:
                places = [token_places(features.tokens, [sequence], 0) for sequence in sequences]
            found = [
                entity
                for each in places
                for entity in _entities(reader.tokens(each), options.aggregation, ignored, card.labels, vocabulary)
            ]
            answers.append(tuple(found if len(places) == 1 else _without_overlaps(found)))
        return tuple(answers)


@dataclass(frozen=True, slots=True)
class _Reader:
    """One text's tokens, with what the pipeline wants to know of each."""

    text: str
    batch: TokenBatch
    scores: FloatArray
    vocabulary: Vocabulary
    unread: Flags | None
    """Tokens of the flat batch that leave nothing in the answer, (total,)."""

    def tokens(self, places: Places) -> list[_Token]:
        """Those at `places` of the flat batch which are not special, nor to be left unread."""
        alignment = self.batch.alignment
        assert alignment is not None
        is_own = alignment.text_ids[places] >= 0
        own = np.flatnonzero(is_own if self.unread is None else is_own & ~self.unread[places])
        offsets = alignment.offsets[places[own]].tolist()
        ids = self.batch.input_ids[places[own]].tolist()
        scores = self.scores[places[own]]
        best = scores.argmax(axis=1)
        score = scores[np.arange(len(best)), best].tolist()
        found = zip(ids, scores, best.tolist(), score, offsets, own.tolist(), strict=True)
        return [self._token(*each) for each in found]

    def _token(
        self, token_id: int, scores: FloatArray, best: int, score: float, offsets: list[int], index: int
    ) -> _Token:
        start, end = offsets
        word, written = self.vocabulary.token(token_id), self.text[start:end]
        if token_id == self.vocabulary.unknown_id:
            return _Token(written, scores, best, score, start, end, index, is_subword=False)
        if self.vocabulary.marks_subwords:
            is_subword = len(word) != len(written)
        else:
            is_subword = start > 0 and " " not in self.text[start - 1 : start + 1]
        return _Token(word, scores, best, score, start, end, index, is_subword)


def _unread(
    scores: FloatArray, options: TokenClassificationOptions, ignored: frozenset[str], labels: Sequence[str]
) -> Flags | None:
    """Tokens that need not be read, because each stands for itself and its label is to be ignored."""
    if options.aggregation != "none":
        return None
    flags: Flags = np.array([label in ignored for label in labels], np.bool_)[scores.argmax(axis=1)]
    return flags


def _entities(
    tokens: Sequence[_Token],
    aggregation: Aggregation,
    ignored: frozenset[str],
    labels: Sequence[str],
    vocabulary: Vocabulary,
) -> list[Entity]:
    """But for those whose labels are to be ignored."""
    if aggregation == "none":
        found = [(labels[token.best], token) for token in tokens]
        return [Entity(label, t.score, t.word, t.start, t.end, t.index) for label, t in found if label not in ignored]
    if aggregation == "simple":
        tagged = [_Tagged(labels[token.best], token.score, [token]) for token in tokens]
    else:
        tagged = _tagged_words(list(_words(tokens)), aggregation, labels)
    groups = [(_name(members), members) for members in _groups(tagged)]
    return [
        _group(name, members, vocabulary, aggregation != "simple") for name, members in groups if name not in ignored
    ]


def _tagged_words(words: Sequence[list[_Token]], aggregation: Aggregation, labels: Sequence[str]) -> list[_Tagged]:
    if not words:
        return []
    scores = _word_scores(words, aggregation)
    best = scores.argmax(axis=1)
    score = scores[np.arange(len(words)), best].tolist()
    return [_Tagged(labels[b], s, word) for b, s, word in zip(best.tolist(), score, words, strict=True)]


def _words(tokens: Iterable[_Token]) -> Iterator[list[_Token]]:
    word: list[_Token] = []
    for token in tokens:
        if word and not token.is_subword:
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _word_scores(words: Sequence[list[_Token]], aggregation: Aggregation) -> FloatArray:
    """(words, labels)."""
    if aggregation == "first":
        return np.stack([word[0].scores for word in words])
    if aggregation == "max":
        return np.stack([max(word, key=lambda token: token.score).scores for word in words])
    lengths = [len(word) for word in words]
    totals = np.add.reduceat(np.stack([token.scores for word in words for token in word]), _starts(lengths))
    means: FloatArray = (totals / np.array(lengths)[:, None]).astype(np.float32, copy=False)
    return means


def _starts(lengths: Sequence[int]) -> npt.NDArray[np.intp]:
    return np.cumsum([0, *lengths[:-1]])


def _groups(tagged: Iterable[_Tagged]) -> Iterator[list[_Tagged]]:
    """Runs of one tag; a label that begins with B- begins a new one."""
    group: list[_Tagged] = []
    for each in tagged:
        begins, tag = _tag(each.label)
        if group and (begins or tag != _tag(group[-1].label)[1]):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _tag(label: str) -> tuple[bool, str]:
    """Whether it begins an entity, and of what kind."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _name(members: Sequence[_Tagged]) -> str:
    return members[0].label.split("-", 1)[-1]


def _group(name: str, members: Sequence[_Tagged], vocabulary: Vocabulary, in_words: bool) -> Entity:
    """In words, each is written by itself, and then all are as if they were tokens."""
    written = [[token.word for token in member.tokens] for member in members]
    return Entity(
        label=name,
        score=sum(member.score for member in members) / len(members),
        word=vocabulary.join([vocabulary.join(word) if in_words else word[0] for word in written]),
        start=members[0].tokens[0].start,
        end=members[-1].tokens[-1].end,
    )


def _without_overlaps(entities: Sequence[Entity]) -> list[Entity]:
    """Of entities that overlap, the longest, then the one with the highest score, as in the pipeline."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda each: each.start):
        if not kept or not _overlap(kept[-1], entity):
            kept.append(entity)
        elif _rank(entity) > _rank(kept[-1]):
            kept[-1] = entity
    return kept


def _overlap(previous: Entity, entity: Entity) -> bool:
    """The same place counts even where it has no length, which the pipeline would list twice."""
    return previous.start <= entity.start < previous.end or (previous.start, previous.end) == (entity.start, entity.end)


def _rank(entity: Entity) -> tuple[int, float]:
    return entity.end - entity.start, entity.score

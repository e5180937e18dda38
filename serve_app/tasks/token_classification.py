"""Token classification (named entities, parts of speech), as transformers' pipeline of that name.

Steps: a softmax for each token; tokens joined to words as the strategy says (`none` and `simple` do not); words
with the same tag after each other joined to groups (`none` does not); labels that are to be ignored dropped.

A text in windows goes through this window by window, and of groups that overlap the longest stays, then the one with
the highest score; with `none`, each token is taken from the window in which it has more around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve_app.options import TokenClassificationOptions
from serve_app.outputs import Entity
from serve_app.tasks.inputs import options_of, stride_of, texts_of, tokenize_request
from serve_app.tasks.scores import softmax
from serve_app.tasks.stitching import Places, token_places
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenBatch, TokenizeRequest


@dataclass(frozen=True, slots=True)
class _Token:
    """One token of a text; `scores` (labels,)."""

    word: str
    scores: FloatArray
    best: int
    """The label that has the highest of the scores."""
    start: int
    end: int
    index: int
    is_subword: bool


@dataclass(frozen=True, slots=True)
class _Tagged:
    """A token or a word with its label."""

    label: str
    score: float
    word: str
    start: int
    end: int
    index: int | None = None


class TokenClassification:
    name = "token-classification"
    head = "token-logits"
    needs_vocabulary = True

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options_of(request, TokenClassificationOptions)
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
        scores = softmax(features.values)
        answers = []
        for text, sequences in zip(texts_of(request), features.windows(), strict=True):
            reader = _Reader(text, features.tokens, scores, vocabulary)
            if options.aggregation == "none":
                places = [token_places(features.tokens, sequences, stride_of(request, card))]
            else:
                places = [token_places(features.tokens, [sequence], 0) for sequence in sequences]
            found = [
                entity for each in places for entity in _entities(reader.tokens(each), options, card.labels, vocabulary)
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

    def tokens(self, places: Places) -> list[_Token]:
        """Those at `places` of the flat batch which are not special."""
        alignment = self.batch.alignment
        assert alignment is not None
        own = np.flatnonzero(alignment.text_ids[places] >= 0)
        offsets = alignment.offsets[places[own]].tolist()
        ids = self.batch.input_ids[places[own]].tolist()
        scores = self.scores[places[own]]
        found = zip(ids, scores, scores.argmax(axis=1).tolist(), offsets, own.tolist(), strict=True)
        return [self._token(*each) for each in found]

    def _token(self, token_id: int, scores: FloatArray, best: int, offsets: list[int], index: int) -> _Token:
        start, end = offsets
        word, written = self.vocabulary.token(token_id), self.text[start:end]
        if token_id == self.vocabulary.unknown_id:
            return _Token(written, scores, best, start, end, index, is_subword=False)
        if self.vocabulary.marks_subwords:
            is_subword = len(word) != len(written)
        else:
            is_subword = start > 0 and " " not in self.text[start - 1 : start + 1]
        return _Token(word, scores, best, start, end, index, is_subword)


def _entities(
    tokens: Sequence[_Token], options: TokenClassificationOptions, labels: Sequence[str], vocabulary: Vocabulary
) -> list[Entity]:
    """But for those whose labels are to be ignored."""
    if options.aggregation in ("none", "simple"):
        tagged = [_tagged(token.scores, token.best, labels, [token]) for token in tokens]
    else:
        words = [(word, _word_scores(word, options.aggregation)) for word in _words(tokens)]
        tagged = [
            replace(
                _tagged(scores, int(scores.argmax()), labels, word),
                word=vocabulary.join([token.word for token in word]),
            )
            for word, scores in words
        ]
    ignored = options.ignore_labels
    if options.aggregation == "none":
        found = [each for each in tagged if each.label not in ignored]
        return [Entity(t.label, t.score, t.word, t.start, t.end, t.index) for t in found]
    groups = [(_name(members), members) for members in _groups(tagged)]
    return [_group(name, members, vocabulary) for name, members in groups if name not in ignored]


def _tagged(scores: FloatArray, best: int, labels: Sequence[str], tokens: Sequence[_Token]) -> _Tagged:
    first = tokens[0]
    return _Tagged(labels[best], float(scores[best]), first.word, first.start, tokens[-1].end, first.index)


def _words(tokens: Iterable[_Token]) -> Iterator[list[_Token]]:
    word: list[_Token] = []
    for token in tokens:
        if word and not token.is_subword:
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _word_scores(word: Sequence[_Token], aggregation: str) -> FloatArray:
    if aggregation == "first":
        return word[0].scores
    if aggregation == "max":
        return max(word, key=lambda token: float(token.scores.max())).scores
    mean: FloatArray = np.mean([token.scores for token in word], axis=0, dtype=np.float32)
    return mean


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


def _group(name: str, members: Sequence[_Tagged], vocabulary: Vocabulary) -> Entity:
    return Entity(
        label=name,
        score=sum(member.score for member in members) / len(members),
        word=vocabulary.join([member.word for member in members]),
        start=members[0].start,
        end=members[-1].end,
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

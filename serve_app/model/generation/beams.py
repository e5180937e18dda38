"""Beam search of one sequence, a step at a time, with the beams that `model.generate` would find were it alone.

The rules are those of transformers' `_beam_search` (generation/utils.py) for a batch of one. The likeliest
continuations are looked for in the logits of many sequences at once; all else is done with the few numbers of the
beams, on the CPU, in float32 as there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.model.generation.sampling import Rules, no_numbers

Floats: TypeAlias = NDArray[np.float32]
Places: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

NEVER = np.float32(-1.0e9)
"""The score of what is no beam; added to a score, it makes one of it."""


@dataclass(frozen=True, slots=True)
class Advance:
    """Beam i goes on from what was beam `parents[i]`, with `tokens[i]`."""

    parents: list[int]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Continuations:
    """k ≥ 2 b continuations of the b beams: the likeliest ones, best first, or those that were drawn."""

    scores: Floats
    parents: list[int]
    tokens: list[int]
    ends: Bools
    """Whether it ends there."""


class BeamSearch:
    """Belongs to one sequence and to the device thread. It has b beams that run, and the b best that have ended."""

    def __init__(self, config: Any, rules: Rules, prompt: Tensor) -> None:
        """`prompt` (1, p) is what the decoder starts from; `config` comes from `generation_config`."""
        self.beams = beams = int(config.num_beams)
        self._rules, self._length_penalty, self._early = rules, float(config.length_penalty), config.early_stopping
        self.ends = frozenset([] if rules.ends is None else rules.ends.tolist())
        self._kept = max(2, 1 + (0 if rules.ends is None else len(rules.ends))) * beams
        self._prompt = int(prompt.shape[1])
        self._ids = prompt.new_empty((beams, self._prompt + rules.limit)) if rules.processors else None
        """What processors read."""
        if self._ids is not None:
            self._ids[:, : self._prompt] = prompt
        self._running: list[list[int]] = [[]] * beams
        """New tokens."""
        self.scores = np.full(beams, NEVER)
        self.scores[0] = 0.0  # all beams are equal at first, and only one of them may go on
        self._ended: list[list[int]] = [[]] * beams
        self._ended_scores = np.full(beams, NEVER)
        self._has_ended = np.zeros(beams, dtype=np.bool_)
        self._may_improve = True

    @property
    def kind(self) -> Hashable:
        """Searches of one kind are advanced together; one that draws goes alone, with its own random numbers."""
        return (self.beams, self._kept, id(self) if self._rules.sample else None)

    def processed(self, chances: Tensor) -> Tensor:
        """Log probabilities (b, v) as the request's options change them."""
        if self._ids is None:
            return chances
        processed: Tensor = self._rules.processors(self._ids[:, : self._prompt + len(self._running[0])], chances)
        return processed

    def continuations(self, summed: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of continuations and their places in `summed` (m, b v), both (m, k), m = 1 where it draws."""
        if not self._rules.sample:
            scores, places = summed.topk(self._kept)
            return scores, places
        weights = summed.softmax(-1)
        if bool(torch.isnan(weights).any()):
            return summed.new_full((1, self._kept), math.nan), weights.new_zeros((1, self._kept), dtype=torch.long)
        places = torch.multinomial(weights, self._kept, generator=self._rules.random)
        return summed.gather(-1, places), places

    def take(self, scores: Floats, places: Places, vocabulary: int) -> Advance | None:
        """One token more for each beam, of k continuations; None when the search has ended."""
        found = self._found(scores, places.tolist(), vocabulary)
        self._end_beams(found)
        open_scores = found.scores + _never(found.ends)
        chosen = _best(open_scores, self.beams)
        self.scores = open_scores[chosen]
        ahead = Advance([found.parents[i] for i in chosen], [found.tokens[i] for i in chosen])
        self._running = [[*self._running[p], t] for p, t in zip(ahead.parents, ahead.tokens, strict=True)]
        if not self._goes_on(found.ends):
            return None
        if self._ids is not None:
            self._ids = self._ids[ahead.parents]
            at = self._prompt + len(self._running[0]) - 1
            self._ids[:, at] = torch.tensor(ahead.tokens, device=self._ids.device)
        return ahead

    def best(self) -> list[int]:
        """The new tokens of the best beam that has ended; none where none has."""
        return self._ended[0]

    def _found(self, scores: Floats, places: list[int], vocabulary: int) -> Continuations:
        tokens = [place % vocabulary for place in places]
        is_full = len(self._running[0]) + 1 == self._rules.limit
        ends = np.array([is_full or token in self.ends for token in tokens])
        return Continuations(scores, [place // vocabulary for place in places], tokens, ends)

    def _end_beams(self, found: Continuations) -> None:
        """Keep the best of those that have ended; of the continuations only the first b may be among them."""
        generated, beams = len(self._running[0]) + 1, self.beams
        ending = found.ends.copy()
        ending[beams:] = False
        scores = self._normalized(found.scores, generated)
        if not self._may_improve or self._is_full():
            scores += NEVER
        merged = np.concatenate((self._ended_scores, scores + _never(~ending)))
        best = _best(merged, beams)
        self._ended_scores = merged[best]
        self._has_ended = np.concatenate((self._has_ended, ending))[best]
        ended = self._ended
        self._ended = [
            ended[i] if i < beams else [*self._running[found.parents[i - beams]], found.tokens[i - beams]] for i in best
        ]

    def _goes_on(self, ends: Bools) -> bool:
        """Whether a running beam may yet be better than those that have ended, by transformers' estimate."""
        longest = self._early == "never" and self._length_penalty > 0.0
        length = self._rules.limit if longest else len(self._running[0])
        possible = self._normalized(self.scores[:1], length)
        to_beat = np.where(self._has_ended, self._ended_scores.min(), NEVER)
        self._may_improve = self._may_improve and bool((possible > to_beat).any())
        return self._may_improve and not self._is_full() and not bool(ends.all())

    def _normalized(self, scores: Floats, length: int) -> Floats:
        with np.errstate(all="ignore"):  # the power is 0 or infinite where the penalty is beyond reason
            return scores / np.float32(length**self._length_penalty)

    def _is_full(self) -> bool:
        return self._early is True and bool(self._has_ended.all())


def advance(searches: Sequence[BeamSearch], logits: Tensor) -> list[Advance | Exception | None]:
    """One token more for each beam of some searches of one kind, from the model's `logits` (n b, v) of all their beams.

    Of each search: how it goes on, None when it has ended, or the exception that it ends with (`no_numbers`).
    """
    beams, vocabulary = searches[0].beams, logits.shape[-1]
    chances: Tensor = logits.to(torch.float32).log_softmax(-1)
    failures: dict[int, Exception] = {}
    for i, search in enumerate(searches):
        own = chances[i * beams : (i + 1) * beams]
        try:
            processed = search.processed(own)
            if processed is not own:
                own.copy_(processed)
        except Exception as error:
            failures[i] = error
    before = np.concatenate([search.scores for search in searches])
    chances += torch.from_numpy(before).to(chances.device)[:, None]
    best, places = (t.cpu().numpy() for t in searches[0].continuations(chances.view(len(searches), -1)))
    advances: list[Advance | Exception | None] = []
    for i, search in enumerate(searches):
        if i in failures:
            advances.append(failures[i])
        elif np.isnan(best[i]).any():  # they count as the largest
            advances.append(no_numbers(logits[i * beams : (i + 1) * beams]))
        else:
            advances.append(search.take(best[i], places[i], vocabulary))
    return advances


def _never(where: Bools) -> Floats:
    """What makes no beam of a score, there; elsewhere nothing."""
    return where.astype(np.float32) * NEVER


def _best(scores: Floats, count: int) -> list[int]:
    """The places of the highest, by torch: of equal scores it has its own order, which `generate` has too."""
    places: list[int] = torch.from_numpy(scores).topk(count)[1].tolist()
    return places


def reordered(rows: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The beams' new rows, and which rows are to be copied to which, where beam i was at `rows[i]`.

    A beam that goes on keeps its row for one of those that come of it; the others get rows of beams that do not go on.
    """
    found: list[int | None] = []
    kept: set[int] = set()
    for parent in parents:
        found.append(None if parent in kept else rows[parent])
        kept.add(parent)
    free = [row for beam, row in enumerate(rows) if beam not in kept]
    moves = [(rows[parent], free.pop()) for row, parent in zip(found, parents, strict=True) if row is None]
    targets = iter([target for _, target in moves])
    new = [next(targets) if row is None else row for row in found]
    return new, [source for source, _ in moves], [target for _, target in moves]

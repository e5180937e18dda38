"""Beam search of one sequence, a step at a time, with the beams that `model.generate` would find were it alone.

Scores are kept, and beams are ended, by transformers' own functions, in the order of `_beam_search`
(generation/utils.py); what that loop does with the cache is left to the rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.model.generation.sampling import Rules

NEVER = -1.0e9
"""The score of what is no beam yet."""


@dataclass(frozen=True, slots=True)
class Advance:
    """Beam i goes on from what was beam `parents[i]`, with `tokens[i]`."""

    parents: list[int]
    tokens: list[int]


class BeamSearch:
    """Belongs to one sequence and to the device thread. b beams, of which k ≥ 2 b continuations are looked at."""

    def __init__(self, model: Any, config: Any, rules: Rules, prompt: Tensor) -> None:
        """`prompt` (1, p) is what the decoder starts from; `config` has gone through `rules_of`."""
        self._model, self._config, self._rules = model, config, rules
        self.beams = beams = int(config.num_beams)
        device = prompt.device
        ends = 0 if rules.ends is None else len(rules.ends)
        self._prompt = self._length = int(prompt.shape[1])
        self._kept = max(2, 1 + ends) * beams
        self._likeliest = torch.arange(self._kept, device=device) < beams
        self._running = prompt.new_zeros((1, beams, self._prompt + rules.limit))
        self._running[:, :, : self._prompt] = prompt
        self._running_scores = torch.full((1, beams), NEVER, device=device)
        self._running_scores[:, 0] = 0.0  # all beams are equal at first, and only one of them may go on
        self._ended = self._running.clone()
        self._ended_scores = torch.full((1, beams), NEVER, device=device)
        self._ended_lengths = torch.zeros((1, beams), dtype=torch.long, device=device)
        self._has_ended = torch.zeros((1, beams), dtype=torch.bool, device=device)
        self._may_improve = torch.ones((1, 1), dtype=torch.bool, device=device)

    def advance(self, logits: Tensor) -> Advance | None:
        """One token more for each beam, from the model's `logits` (b, v); None when the search has ended.

        Raises as `Rules.raise_if_no_numbers` does.
        """
        scores, running, parents = self._continuations(logits)
        has_room = self._length + 1 < self._running.shape[2]
        ends = self._ends(running[:, :, self._length], has_room)
        self._end_beams(scores, running, ends)
        self._running, self._running_scores, parents = self._model._get_running_beams_for_next_iteration(
            scores, running, parents, ends, self.beams
        )
        self._length += 1
        if not self._goes_on(ends):
            return None
        newest = self._running[:, :, self._length - 1]
        chosen, tokens = torch.cat((parents, newest)).tolist()
        return Advance(chosen, tokens)

    def best(self) -> list[int]:
        """The new tokens of the best beam that has ended; none where none has."""
        tokens: list[int] = self._ended[0, 0, self._prompt : self._prompt + int(self._ended_lengths[0, 0])].tolist()
        return tokens

    def _continuations(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest continuations, or k drawn ones: their scores (1, k), tokens (1, k, length), beams (1, k)."""
        rules, length = self._rules, self._length
        chances = rules.processors(self._running[0, :, :length], logits.to(torch.float32).log_softmax(-1))
        summed = (chances + self._running_scores[0, :, None]).view(1, -1)
        if rules.sample:
            weights = summed.softmax(-1)
            rules.raise_if_no_numbers(weights, logits)
            places = torch.multinomial(weights, self._kept, generator=rules.random)
            scores = summed.gather(1, places)
        else:
            scores, places = summed.topk(self._kept)
            rules.raise_if_no_numbers(scores, logits)  # what is no number counts as the largest
        parents = places // logits.shape[-1]
        running = self._model._gather_beams(self._running, parents)
        running[:, :, length] = places % logits.shape[-1]
        return scores, running, parents

    def _ends(self, tokens: Tensor, has_room: bool) -> Tensor:
        """Which of the continuations, (1, k), end there."""
        if not has_room:
            return torch.ones_like(tokens, dtype=torch.bool)
        if self._rules.ends is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self._rules.ends)

    def _end_beams(self, scores: Tensor, running: Tensor, ends: Tensor) -> None:
        self._ended, self._ended_scores, self._ended_lengths, self._has_ended = self._model._update_finished_beams(
            sequences=self._ended,
            topk_running_sequences=running,
            beam_scores=self._ended_scores,
            topk_log_probs=scores,
            beam_indices=self._ended_lengths,  # transformers keeps each token's beam here, to count the tokens
            topk_running_beam_indices=self._ended_lengths.new_full((1, self._kept), self._length + 1 - self._prompt),
            is_early_stop_heuristic_unsatisfied=self._may_improve,
            is_sent_finished=self._has_ended,
            next_token_hits_stopping_criteria=ends,
            top_num_beam_mask=self._likeliest,
            num_beams=self.beams,
            cur_len=self._length,
            decoder_prompt_len=self._prompt,
            length_penalty=self._config.length_penalty,
            early_stopping=self._config.early_stopping,
        )

    def _goes_on(self, ends: Tensor) -> bool:
        early = self._config.early_stopping
        self._may_improve = self._model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self._may_improve,
            running_beam_scores=self._running_scores,
            beam_scores=self._ended_scores,
            is_sent_finished=self._has_ended,
            cur_len=self._length,
            max_length=self._running.shape[2],
            decoder_prompt_len=self._prompt,
            early_stopping=early,
            length_penalty=self._config.length_penalty,
        )
        return bool(self._model._beam_search_has_unfinished_sequences(self._may_improve, self._has_ended, ends, early))


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

"""How many tokens' keys and values the answers under way may come to hold, counted as the tensors hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.model.generation.answering import Answering
from serve_app.model.generation.rectangle import SLACK, SPARE_ROWS, Room


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows, and columns of the decoder and of what was encoded, that answers by steps may come to fill together."""

    rows: int
    own: int
    encoded: int

    @classmethod
    def of(cls, answers: Sequence[Answering]) -> Extent:
        return cls(
            sum(answering.beams for answering in answers),
            max((answering.size.own for answering in answers), default=0),
            max((answering.size.encoded for answering in answers), default=0),
        )

    @property
    def tokens(self) -> int:
        """With the spare columns without which tensors would be made anew at every step."""
        return self.rows * (self.own + SLACK + self.encoded)

    def room(self, max_tokens: int) -> Room:
        """What new tensors may take within so many tokens. There must be a row."""
        columns = max(self.own, min(self.own + SLACK, max_tokens // self.rows - self.encoded))
        return Room(max(0, min(SPARE_ROWS, max_tokens // (columns + self.encoded) - self.rows)), columns)

"""Refuses tokens that the tokenizer has and the model's embedding has not, before they reach a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from serve_app.errors import InvalidInputError
from serve_app.tokenizer.encoded import Encoded, Outcome
from serve_app.types import TokenizeRequest

logger = logging.getLogger(__name__)

_MOST_NAMES = 10
"""Tokens that a warning names."""


class KnownIds:
    """The ids that the model has an embedding for. Never changed after construction."""

    def __init__(self, folder: Path, vocabulary: Mapping[str, int], rows: int | None) -> None:
        """`vocabulary` is the tokenizer's, added tokens included; the model knows ids below `rows`, all where None.

        Warns of tokens that the model does not know.
        """
        self._rows = max(vocabulary.values(), default=-1) + 1 if rows is None else rows
        unknown = {index: token for token, index in vocabulary.items() if index >= self._rows}
        self._unknown = dict(sorted(unknown.items()))
        if self._unknown:
            self._warn(folder.name)

    def _warn(self, name: str) -> None:
        named = [repr(token) for token in self._unknown.values()]
        more = ", ..." if len(named) > _MOST_NAMES else ""
        logger.warning(
            "%s: the tokenizer has %d tokens that the model does not know, whose embedding has %d rows: %s%s. Requests "
            "with one of them are refused. Call resize_token_embeddings, train the new rows and save the model, or "
            "take the tokens out of the tokenizer",
            name,
            len(named),
            self._rows,
            ", ".join(named[:_MOST_NAMES]),
            more,
        )

    def checked(self, requests: Sequence[TokenizeRequest], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes of the requests; one with a token that the model does not know has become a refusal."""
        if not self._unknown:
            return list(outcomes)
        return [
            self._checked(outcome) if request.computed and isinstance(outcome, list) else outcome
            for request, outcome in zip(requests, outcomes, strict=True)
        ]

    def _checked(self, sequences: list[Encoded]) -> Outcome:
        for place, encoded in enumerate(sequences):
            ids = np.asarray(encoded.ids)
            unknown = ids[ids >= self._rows]
            if unknown.size:
                return self._refusal(place if encoded.index is None else encoded.index, int(unknown[0]))
        return sequences

    def _refusal(self, index: int, token_id: int) -> InvalidInputError:
        name = self._unknown.get(token_id, "without a name")
        return InvalidInputError(
            f"inputs[{index}]: has token {token_id} ({name}) of the tokenizer, and the model knows only 0 to "
            f"{self._rows - 1}; send an input without it. If the model's chat template or prompt adds it, the model's "
            "embedding must be resized (resize_token_embeddings)"
        )

"""Fill-mask: the most likely tokens in the places of a text's masks, as transformers' pipeline of that name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from serve_app.errors import InvalidInputError
from serve_app.options import FillMaskOptions
from serve_app.outputs import Fill
from serve_app.tasks.inputs import options_of, stride_of, tokenize_request
from serve_app.tasks.scores import best_first
from serve_app.tasks.stitching import token_places
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Chat, Features, FloatArray, Int32Array, MaskArguments, ModelCard, Request, TokenizeRequest

MOST_FILLS = 20_000
"""Masks of a request times fills of each. Every fill is a text."""

MOST_TARGETS = 1000


class FillMask:
    """A mask that two windows share is filled where more stands around it."""

    name = "fill-mask"
    head = "mask-fill"
    needs_vocabulary = True

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, FillMaskOptions)
        if options.top_k < 1:
            raise InvalidInputError("top_k: must be at least 1")
        if options.targets is not None and len(options.targets) > MOST_TARGETS:
            raise InvalidInputError(f"targets: has {len(options.targets)}, and {MOST_TARGETS} are allowed")
        if card.mask_token_id is None:
            raise InvalidInputError(f"model {card.name} has no mask token")
        tokenize = tokenize_request(request, card)
        return replace(tokenize, align=tokenize.long_texts == "windows")

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> MaskArguments:
        options = options_of(request, FillMaskOptions)
        assert vocabulary is not None
        _check_fills(sum(masks_in(request, vocabulary)), options)
        if options.targets is None:
            return MaskArguments(options.top_k)
        found = [_target(target, vocabulary) for target in options.targets]
        targets = tuple(dict.fromkeys(target for target in found if target is not None))
        if not targets:
            raise InvalidInputError("targets: at least one must have a token")
        if vocabulary.model_ids is not None and max(targets) >= vocabulary.model_ids:
            raise InvalidInputError("targets: one is a token of the tokenizer alone, which the model does not know")
        return MaskArguments(options.top_k, targets)

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[tuple[tuple[Fill, ...], ...], ...]:
        """For each input, for each of its masks, the fills, most likely first."""
        options = options_of(request, FillMaskOptions)
        assert vocabulary is not None
        assert card.mask_token_id is not None
        answers = []
        for index, sequences in enumerate(features.windows()):
            places = token_places(features.tokens, sequences, stride_of(request, card))
            ids = features.tokens.input_ids[places]
            masks = np.flatnonzero(ids == card.mask_token_id)
            if not len(masks):
                raise _without_mask(request, index, vocabulary.token(card.mask_token_id), features)
            rows = _rows_of(features, card.mask_token_id, sequences)
            candidates = [rows[place] for place in places[masks].tolist()]
            answers.append(
                tuple(
                    _fills(ids, int(mask), each, options.top_k, vocabulary, single=len(masks) == 1)
                    for mask, each in zip(masks, candidates, strict=True)
                )
            )
        return tuple(answers)


def _without_mask(request: Request, index: int, token: str, features: Features) -> InvalidInputError:
    sequences = features.windows()[index]
    if features.tokens.truncated[sequences].any() and token in str(request.inputs[index]):
        return InvalidInputError(
            f"inputs[{index}]: its mask token ({token}) was lost where the text was cut; shorten the text, or ask for "
            "windows (long_texts: windows)"
        )
    return InvalidInputError(f"inputs[{index}]: no mask token ({token}) found; mark what is to be filled")


def masks_in(request: Request, vocabulary: Vocabulary) -> list[int]:
    """How many masks each input has, before it is tokenized; windows may see some twice."""
    mask = vocabulary.mask_id
    written = "" if mask is None else vocabulary.token(mask)
    if not written:
        return [0] * len(request.inputs)
    return [
        value.count(written) if isinstance(value, str) else 0 if isinstance(value, Chat) else list(value).count(mask)
        for value in request.inputs
    ]


def _check_fills(masks: int, options: FillMaskOptions) -> None:
    name, each = ("top_k", options.top_k) if options.targets is None else ("targets", len(options.targets))
    if masks * each > MOST_FILLS:
        raise InvalidInputError(
            f"{name}: {each} fills of {masks} masks are more than {MOST_FILLS}; ask for fewer, or send fewer texts"
        )


def _target(target: str, vocabulary: Vocabulary) -> int | None:
    known = vocabulary.token_id(target)
    return vocabulary.first_id(target) if known is None else known


def _rows_of(features: Features, mask_token_id: int, sequences: list[int]) -> dict[int, FloatArray]:
    """The candidates (k, 2) of each mask of these sequences, by its place in the flat batch."""
    found: dict[int, FloatArray] = {}
    for sequence in sequences:
        first, last = features.tokens.cu_seqlens[sequence : sequence + 2].tolist()
        masks = first + np.flatnonzero(features.tokens.input_ids[first:last] == mask_token_id)
        if len(masks):
            each = np.split(features.of_sequence(sequence), len(masks))
            found.update(zip(masks.tolist(), each, strict=True))
    return found


def _fills(
    ids: Int32Array, mask: int, candidates: FloatArray, top_k: int, vocabulary: Vocabulary, single: bool
) -> tuple[Fill, ...]:
    before = [i for i in ids[:mask].tolist() if i != vocabulary.pad_id]
    after = [i for i in ids[mask + 1 :].tolist() if i != vocabulary.pad_id]
    fills = []
    for row in best_first(candidates[:, 1])[:top_k]:
        token = int(candidates[row, 0])
        filled = [*before, *([] if token == vocabulary.pad_id else [token]), *after]
        # Special tokens stay where there are several masks, because the other masks are special too.
        text = vocabulary.decode(filled, skip_special_tokens=single)
        fills.append(Fill(float(candidates[row, 1]), token, vocabulary.decode([token]), text))
    return tuple(fills)

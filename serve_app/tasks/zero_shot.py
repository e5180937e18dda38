"""Zero-shot classification: any labels, by a model of natural language inference, as transformers' pipeline does."""

from __future__ import annotations

import numpy as np

from serve_app.errors import EmptyInputError, InvalidInputError
from serve_app.options import ZeroShotOptions
from serve_app.outputs import LabelScore
from serve_app.tasks.inputs import long_texts_of, options_of, stride_of, texts_of, truncation_side_of
from serve_app.tasks.scores import labelled, softmax
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TextPair, TokenizeRequest


class ZeroShotClassification:
    """Each text goes with each label's hypothesis. Of a text in windows, a label has its best window's entailment."""

    name = "zero-shot-classification"
    head = "sequence-logits"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, ZeroShotOptions)
        _check_model(card)
        return TokenizeRequest(
            inputs=tuple(_pairs(texts_of(request), options)),
            long_texts=long_texts_of(request, card),
            truncation_side=truncation_side_of(request, card),
            stride=stride_of(request, card),
            cut="only_first",
        )

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[tuple[LabelScore, ...], ...]:
        options = options_of(request, ZeroShotOptions)
        starts = [sequences[0] for sequences in features.windows()]
        shape = (len(request.inputs), len(options.labels))
        scores = _scores(features.values, starts, shape, entailment_id(card), options.multi_label)
        # The pipeline reverses an ascending order, so that equal ones come last first.
        return tuple(labelled(options.labels, each, np.argsort(each, kind="stable")[::-1].tolist()) for each in scores)


def entailment_id(card: ModelCard) -> int:
    """The first label that begins with "entail", else the last, as the pipeline takes."""
    return next((i for i, label in enumerate(card.labels) if label.lower().startswith("entail")), len(card.labels) - 1)


def _scores(
    logits: FloatArray, starts: list[int], shape: tuple[int, int], entailment: int, multi_label: bool
) -> FloatArray:
    """Scores (texts, labels); `starts` are the first windows of each pair."""
    if multi_label or shape[1] == 1:
        contradiction = logits.shape[1] - 1 if entailment == 0 else 0
        entailed = softmax(logits[:, [contradiction, entailment]])[:, 1]
        each: FloatArray = np.maximum.reduceat(entailed, starts)
        return each.reshape(shape)
    return softmax(np.maximum.reduceat(logits[:, entailment], starts).reshape(shape))


def _check_model(card: ModelCard) -> None:
    if len(card.labels) < 2:
        raise InvalidInputError(f"model {card.name} has one label; zero-shot classification needs entailment")
    if card.task != "zero-shot-classification" and not any(x.lower().startswith("entail") for x in card.labels):
        raise InvalidInputError(
            f"model {card.name} has no label for entailment, only {', '.join(card.labels[:10])}: it does not answer "
            "zero-shot classification"
        )


def _pairs(texts: tuple[str, ...], options: ZeroShotOptions) -> list[TextPair]:
    """Texts and hypotheses, a text's together."""
    if not options.labels:
        raise EmptyInputError("candidate_labels: send at least one label")
    for index, text in enumerate(texts):
        if not text:
            raise EmptyInputError(f"inputs[{index}]: is empty; send a text")
    hypotheses = [options.hypothesis(label) for label in options.labels]
    return [(text, hypothesis) for text in texts for hypothesis in hypotheses]

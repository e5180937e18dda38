"""Text classification: labels of texts or of pairs of texts, as transformers' pipeline of that name."""

from __future__ import annotations

from serve_app.errors import InvalidInputError
from serve_app.options import ClassificationOptions
from serve_app.outputs import LabelScore
from serve_app.tasks.inputs import options_of, tokenize_request
from serve_app.tasks.scores import apply, best_first, function_of, labelled
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.types import Features, FloatArray, ModelCard, Request, TokenizeRequest


class TextClassification:
    """Scores of a text that is read in windows are those of its windows: their mean, or the highest of each label."""

    name = "text-classification"
    head = "sequence-logits"
    needs_vocabulary = False

    def prepare(self, request: Request, card: ModelCard) -> TokenizeRequest:
        options = options_of(request, ClassificationOptions)
        if options.top_k is not None and options.top_k < 1:
            raise InvalidInputError("top_k: must be at least 1")
        return tokenize_request(request, card)

    def arguments(self, request: Request, vocabulary: Vocabulary | None) -> None:
        return None

    def postprocess(
        self, request: Request, card: ModelCard, features: Features, vocabulary: Vocabulary | None
    ) -> tuple[tuple[LabelScore, ...], ...]:
        options = options_of(request, ClassificationOptions)
        scores = apply(options.function or function_of(card), features.values)
        answers = []
        for sequences in features.windows():
            merged = _merged(scores[sequences[0] : sequences[-1] + 1], options)
            answers.append(labelled(card.labels, merged, best_first(merged)[: options.top_k]))
        return tuple(answers)


def _merged(scores: FloatArray, options: ClassificationOptions) -> FloatArray:
    """Scores (labels,) of a text from those of its windows (k, labels)."""
    merged: FloatArray = scores.max(axis=0) if options.over_windows == "max" else scores.mean(axis=0)
    return merged

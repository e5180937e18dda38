"""Logits to scores, as transformers' pipelines compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from serve_app.outputs import LabelScore
from serve_app.types import Activation, FloatArray, ModelCard

Function: TypeAlias = Literal["sigmoid", "softmax", "none"]

ACTIVATIONS: Mapping[Activation, Callable[[FloatArray], FloatArray]] = {
    "identity": lambda logits: logits,
    "sigmoid": lambda logits: sigmoid(logits),
    "tanh": np.tanh,
}
"""All of them keep the order of what they are given."""


def sigmoid(logits: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)), without overflow."""
    scores: FloatArray = np.exp(-np.logaddexp(np.float32(0), -logits)).astype(np.float32)
    return scores


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return scores


def function_of(card: ModelCard) -> Function:
    """What transformers' text-classification pipeline applies where it is told nothing."""
    if card.problem_type == "regression":
        return "none"
    if card.problem_type == "multi_label_classification" or len(card.labels) == 1:
        return "sigmoid"
    return "softmax"


def apply(function: Function, logits: FloatArray) -> FloatArray:
    if function == "none":
        return logits
    return sigmoid(logits) if function == "sigmoid" else softmax(logits)


def best_first(scores: npt.NDArray[np.floating]) -> list[int]:
    """Indices from the highest score to the lowest; equal ones in their order."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def labelled(labels: Sequence[str], scores: npt.NDArray[np.floating], order: Sequence[int]) -> tuple[LabelScore, ...]:
    return tuple(LabelScore(labels[i], float(scores[i])) for i in order)

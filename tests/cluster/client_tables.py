"""What clients of other projects are asked to do with the example of all tasks: the same call, sync and async."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TEXT = "My name is Sarah and I live in London."
MESSAGES = [{"role": "user", "content": "hello"}]


class Call(NamedTuple):
    """A method of `huggingface_hub.InferenceClient` for a model of the example, and how the answer's items look."""

    model: str
    method: str
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    fields: Sequence[str] = ()


HUGGINGFACE = [
    Call("embedding", "feature_extraction", [TEXT], {"normalize": True, "truncate": True}),
    Call("embedding", "sentence_similarity", [TEXT], {"other_sentences": ["a cat", "a name"]}),
    Call("rerank", "sentence_similarity", [TEXT], {"other_sentences": ["a cat", "a name"]}),
    Call("text-classification", "text_classification", [TEXT], {"top_k": 2}, ["label", "score"]),
    Call("zero-shot", "zero_shot_classification", [TEXT, ["x", "y"]], {"multi_label": True}, ["label", "score"]),
    Call(
        "token-classification",
        "token_classification",
        [TEXT],
        {"aggregation_strategy": "simple", "ignore_labels": [], "stride": 2},
        ["entity_group", "word", "start", "end", "score"],
    ),
    Call(
        "fill-mask",
        "fill_mask",
        ["Paris is the [MASK] of France."],
        {"top_k": 3},
        ["score", "token", "token_str", "sequence"],
    ),
    Call(
        "question-answering",
        "question_answering",
        [],
        {"question": "Where?", "context": TEXT, "top_k": 2},
        ["answer", "score", "start", "end"],
    ),
    Call("summarization", "summarization", [TEXT], {"generate_parameters": {"max_new_tokens": 5}}),
    Call("translation", "translation", [TEXT], {"generate_parameters": {"max_new_tokens": 5}}),
    Call("text2text", "text_generation", [TEXT], {"max_new_tokens": 9, "do_sample": True, "seed": 3}),
    Call("text-generation", "text_generation", [TEXT], {"max_new_tokens": 5, "do_sample": True, "seed": 3}),
]

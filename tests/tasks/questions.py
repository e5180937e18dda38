"""Answers to questions by the rules of the pipeline of transformers 4.57, written out the slow way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from serve_app.options import QuestionAnsweringOptions
from tests.tasks.families import Family

TYPED = frozenset({"BertTokenizer", "AlbertTokenizer", "XLNetTokenizer", "TokenizersBackend"})
"""Tokenizers that give token types in transformers 4.57.6 (the last one is PreTrainedTokenizerFast there)."""


def answers(given: Family, question: str, context: str, options: QuestionAnsweringOptions) -> list[dict[str, Any]]:
    """`preprocess`, `_forward` and `postprocess` of transformers 4.57.6, pipelines/question_answering.py."""
    longest = min(given.tokenizer.model_max_length, options.max_seq_len or 384)
    stride = min(longest // 2, 128) if options.doc_stride is None else options.doc_stride
    question_first = given.tokenizer.padding_side == "right"
    encoded = given.tokenizer(
        text=question if question_first else context,
        text_pair=context if question_first else question,
        truncation="only_second" if question_first else "only_first",
        max_length=longest,
        stride=stride,
        return_token_type_ids=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if _is_typed(given) else [])]
    context_place = 1 if question_first else 0
    pre_top_k = options.top_k * 2 + 10 if options.align_to_words else options.top_k
    least_null, found = 1000000.0, []
    for window in range(len(encoded["input_ids"])):
        inputs = {name: torch.tensor([encoded[name][window]]) for name in names}
        with torch.inference_mode():
            out = given.model(**inputs)
        ids = np.array(encoded["input_ids"][window])
        allowed = np.array([text == 1 if question_first else True for text in encoded.sequence_ids(window)]) | (
            ids == given.tokenizer.cls_token_id
        )
        start, end = (
            np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            for logits in (np.where(allowed, one[0].numpy(), -10000.0) for one in (out.start_logits, out.end_logits))
        )
        least_null = min(least_null, float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        products = np.tril(np.triu(np.outer(start, end)), options.max_answer_len - 1)
        best = np.argsort(-products.ravel(), kind="stable")[:pre_top_k]
        for place in best:
            first, last = (int(i) for i in np.unravel_index(place, products.shape))
            if not (allowed[first] and allowed[last] and products[first, last] > 0.0):
                continue
            a, b = characters(encoded[window], first, last, context_place, options.align_to_words)
            add(found, context[a:b], a, b, float(products[first, last]))
    if options.handle_impossible_answer:
        found.append({"score": least_null, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda each: each["score"], reverse=True)[: options.top_k]


def _is_typed(given: Family) -> bool:
    named = given.tokenizer.init_kwargs.get("model_input_names")
    return type(given.tokenizer).__name__ in TYPED if named is None else "token_type_ids" in named


def characters(encoding: Any, first: int, last: int, place: int, align_to_words: bool) -> tuple[int, int]:
    if not align_to_words:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    try:
        return (
            encoding.word_to_chars(encoding.token_to_word(first), sequence_index=place)[0],
            encoding.word_to_chars(encoding.token_to_word(last), sequence_index=place)[1],
        )
    except (TypeError, ValueError):
        return encoding.offsets[first][0], encoding.offsets[last][1]


def add(answers: list[dict[str, Any]], text: str, start: int, end: int, score: float) -> None:
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": start, "end": end, "answer": text})

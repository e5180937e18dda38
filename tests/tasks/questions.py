"""Answers to questions by the rules of the pipeline of transformers 4.57, written out the slow way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from serve_app.options import QuestionAnsweringOptions
from tests.tasks.families import Family


def answers(given: Family, question: str, context: str, options: QuestionAnsweringOptions) -> list[dict[str, Any]]:
    """`preprocess`, `_forward` and `postprocess` of transformers 4.57.6, pipelines/question_answering.py."""
    longest = min(given.tokenizer.model_max_length, options.max_seq_len or 384)
    stride = min(longest // 2, 128) if options.doc_stride is None else options.doc_stride
    encoded = given.tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=longest,
        stride=stride,
        return_token_type_ids=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    least_null, found = 1000000.0, []
    for window in range(len(encoded["input_ids"])):
        inputs = {name: torch.tensor([encoded[name][window]]) for name in given.tokenizer.model_input_names}
        with torch.inference_mode():
            out = given.model(**inputs)
        ids = np.array(encoded["input_ids"][window])
        allowed = np.array([text == 1 for text in encoded.sequence_ids(window)]) | (ids == given.tokenizer.cls_token_id)
        start, end = (
            np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            for logits in (np.where(allowed, one[0].numpy(), -10000.0) for one in (out.start_logits, out.end_logits))
        )
        least_null = min(least_null, float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        products = np.tril(np.triu(np.outer(start, end)), options.max_answer_len - 1)
        best = np.argsort(-products.ravel(), kind="stable")[: options.top_k * 2 + 10]
        for place in best:
            first, last = (int(i) for i in np.unravel_index(place, products.shape))
            if not (allowed[first] and allowed[last] and products[first, last] > 0.0):
                continue
            a, b = characters(encoded[window], first, last, options.align_to_words)
            add(found, context[a:b], a, b, float(products[first, last]))
    if options.handle_impossible_answer:
        found.append({"score": least_null, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda each: each["score"], reverse=True)[: options.top_k]


def characters(encoding: Any, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    if not align_to_words:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    try:
        return (
            encoding.word_to_chars(encoding.token_to_word(first), sequence_index=1)[0],
            encoding.word_to_chars(encoding.token_to_word(last), sequence_index=1)[1],
        )
    except (TypeError, ValueError):
        return encoding.offsets[first][0], encoding.offsets[last][1]


def add(answers: list[dict[str, Any]], text: str, start: int, end: int, score: float) -> None:
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": start, "end": end, "answer": text})

"""Question answering against the rules of the pipeline of transformers 4.57."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, XLNetTokenizer

from serve_app.errors import EmptyInputError, InputTooLongError, InvalidInputError
from serve_app.options import QuestionAnsweringOptions
from serve_app.types import Request
from tests.model.tiny import tiny_model
from tests.tasks.families import FAMILIES, LIMIT, TEXTS, Family, family, saved, tokenizer_of, with_card
from tests.tasks.questions import answers
from tests.tokenizer.kinds import xlm_roberta

LONG = "Hugging Face Inc. was sent to New York, said they. The model reads one of its words. " * 6


def spans(given: Family, pairs: Any, options: QuestionAnsweringOptions, **keys: Any) -> Any:
    return given.answer(Request("1", given.card.name, "question-answering", tuple(pairs), options, **keys))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        QuestionAnsweringOptions(),
        QuestionAnsweringOptions(top_k=4),
        QuestionAnsweringOptions(top_k=3, handle_impossible_answer=True),
        QuestionAnsweringOptions(top_k=3, max_answer_len=1),
        QuestionAnsweringOptions(top_k=2, doc_stride=3, max_answer_len=40),
        QuestionAnsweringOptions(top_k=2, doc_stride=0, max_seq_len=40),
        QuestionAnsweringOptions(top_k=6, align_to_words=False),
    ],
    ids=["default", "several", "impossible", "one token", "stride", "short windows", "parts of words"],
)
def test_answers_are_the_pipelines(name: str, options: QuestionAnsweringOptions) -> None:
    given = family(name, "AutoModelForQuestionAnswering")
    contexts = [*TEXTS.values(), LONG]
    pairs = [("who reads?", context) for context in contexts if given.tokenizer.tokenize(context)]
    for got, (question, context) in zip(spans(given, pairs, options), pairs, strict=True):
        wanted = answers(given, question, context, options)
        assert [(span.answer, span.start, span.end) for span in got] == [
            (each["answer"], each["start"], each["end"]) for each in wanted
        ]
        np.testing.assert_allclose([span.score for span in got], [each["score"] for each in wanted], atol=1e-5)


def generic(folder: Path, **keys: Any) -> Path:
    """Files of a tokenizer that is of no class but transformers' generic one."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    backend = tokenizer_of("roberta").backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LIMIT, **roles, **keys).save_pretrained(folder)
    return folder


def questions(folder: Path, name: str, **sizes: Any) -> Family:
    """A random model for questions, whose tokenizer's files lie in `folder`."""
    size = len(AutoTokenizer.from_pretrained(str(folder)))
    model = tiny_model(name, task="question-answering", vocab_size=size, **sizes)
    model.save_pretrained(folder)
    return saved(folder, model, max_input_tokens=LIMIT, task="question-answering")


def assert_answers_are_the_pipelines(given: Family, options: QuestionAnsweringOptions) -> None:
    contexts = [text for text in (*TEXTS.values(), LONG) if given.tokenizer.tokenize(text)]
    for context in contexts:
        [got], wanted = spans(given, [("who?", context)], options), answers(given, "who?", context, options)
        assert [(span.start, span.end) for span in got] == [(each["start"], each["end"]) for each in wanted]
        np.testing.assert_allclose([span.score for span in got], [each["score"] for each in wanted], atol=1e-5)


def test_a_tokenizer_without_a_cls_token_has_none_that_may_begin_an_answer(tmp_path: Path) -> None:
    given = questions(generic(tmp_path), "bert")
    assert given.tokenizer.cls_token_id is None
    assert_answers_are_the_pipelines(given, QuestionAnsweringOptions(top_k=3, handle_impossible_answer=True))


@pytest.mark.parametrize(
    "options",
    [
        QuestionAnsweringOptions(top_k=4, handle_impossible_answer=True),
        QuestionAnsweringOptions(top_k=2, doc_stride=3, align_to_words=False),
    ],
    ids=["words", "parts of words"],
)
@pytest.mark.parametrize("kind", ["xlnet", "generic"])
def test_the_context_comes_first_where_the_tokenizer_pads_on_the_left(
    kind: str, options: QuestionAnsweringOptions, tmp_path: Path
) -> None:
    """XLNet's tokenizer pads on the left by its class, and has its CLS token at the end; others are told to."""
    if kind == "xlnet":
        model = json.loads(xlm_roberta().to_str())["model"]
        pieces = [tuple(piece) for piece in model["vocab"]]
        XLNetTokenizer(vocab=[*pieces, ("<sep>", 0.0), ("<cls>", 0.0)], model_max_length=LIMIT).save_pretrained(
            tmp_path
        )
        given = questions(tmp_path, "xlnet")
        assert given.card.cls_token_id is not None
    else:
        given = questions(generic(tmp_path, padding_side="left"), "bert")
    assert given.tokenizer.padding_side == "left"
    assert_answers_are_the_pipelines(given, options)


def test_a_long_context_is_read_in_several_windows() -> None:
    given = family("bert", "AutoModelForQuestionAnswering")
    assert len(LONG) > 10 * LIMIT
    found = spans(given, [("who?", f"{LONG} élève señor ёлка")], QuestionAnsweringOptions(top_k=500))[0]
    assert [span for span in found if span.start >= len(LONG)]


def test_a_question_that_leaves_little_room_has_windows_that_share_less() -> None:
    given = family("bert", "AutoModelForQuestionAnswering")
    options = QuestionAnsweringOptions(top_k=1)
    question = "the " * (LIMIT - 10)
    assert spans(given, [(question, LONG)], options)[0][0].answer
    with pytest.raises(InputTooLongError, match="its first text takes all of the 48 tokens"):
        spans(given, [("the " * LIMIT, LONG)], options)


@pytest.mark.parametrize("pair", [("", "the model"), ("who?", "")])
def test_what_is_empty_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(EmptyInputError):
        spans(family("bert", "AutoModelForQuestionAnswering"), [pair], QuestionAnsweringOptions())


@pytest.mark.parametrize(
    "options",
    [
        QuestionAnsweringOptions(top_k=0),
        QuestionAnsweringOptions(max_answer_len=0),
        QuestionAnsweringOptions(max_seq_len=0),
        QuestionAnsweringOptions(max_seq_len=2),
        QuestionAnsweringOptions(doc_stride=LIMIT),
        QuestionAnsweringOptions(doc_stride=-1),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: QuestionAnsweringOptions) -> None:
    with pytest.raises(InvalidInputError):
        spans(family("bert", "AutoModelForQuestionAnswering"), [("who?", LONG)], options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (QuestionAnsweringOptions(top_k=1001), "top_k: must be at most 1000"),
        (QuestionAnsweringOptions(top_k=1000, doc_stride=0), "top_k: 1000 answers in each of [0-9]+ windows are more"),
    ],
    ids=["answers", "answers in windows"],
)
def test_more_answers_than_anybody_reads_are_refused(options: QuestionAnsweringOptions, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        spans(family("bert", "AutoModelForQuestionAnswering"), [("who?", LONG * 10)], options)


def test_long_answers_in_very_long_windows_are_refused() -> None:
    given = with_card(family("bert", "AutoModelForQuestionAnswering"), max_input_tokens=8192)
    request = QuestionAnsweringOptions(max_seq_len=8192, max_answer_len=8192)
    with pytest.raises(InvalidInputError, match="max_answer_len: must be at most 512 in windows of 8192 tokens"):
        spans(given, [("who?", LONG)], request)


def test_a_long_context_is_refused_or_cut_where_that_is_asked_for() -> None:
    given = family("bert", "AutoModelForQuestionAnswering")
    options = QuestionAnsweringOptions(top_k=50)
    with pytest.raises(InputTooLongError):
        spans(given, [("who?", LONG)], options, long_texts="error")
    with pytest.raises(InputTooLongError):
        spans(with_card(given, long_texts="error"), [("who?", LONG)], options)
    cut = spans(given, [("who?", LONG)], options, long_texts="truncate")[0]
    assert max(span.end for span in cut) < 150

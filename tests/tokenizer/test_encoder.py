"""Encoder against transformers' AutoTokenizer, which is the reference for what a model's ids are."""

# ruff: noqa: RUF001  # letters that look like others are what is tested

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from serve_app.errors import (
    ConfigError,
    IncompleteModelError,
    InputTooLongError,
    InvalidInputError,
    ModelFailureError,
)
from serve_app.tokenizer.bounded import BoundedTokenizer
from serve_app.tokenizer.encoder import Encoder
from serve_app.tokenizer.framed import FramedTokenizer
from serve_app.types import LongTexts, Side, TextInput, TokenBatch, TokenizeRequest
from tests.reference import minilm_folder
from tests.tokenizer.kinds import LIMIT, TYPED, byte_level, save, sequences, wordpiece

TEXTS = {
    "one word": "hello",
    "a sentence": "The model reads a long line of small words, and gives back one vector.",
    "no letters": " \t\r\n ",
    "NUL": "nul\x00byte",
    "emoji": "☕ 👩‍👩‍👧 🇩🇪 e",
    "combining": "e\u0301 Å A\u030a zero\u200bwidth n\u0303o",
    "right to left": "مرحبا بالعالم שלום עולם",
    "CJK": "你好，世界。東京都 カタカナ 한국어",
    "CRLF": "line\r\nline\r\n\r\nline",
    "many spaces": "  a   b\t\tc  ",
    "special tokens in the text": "a [MASK] b <mask> c [SEP] </s> d",
    "no space at all": "w" * 10_000,
    "no space, not a letter": "!?" * 500,
    "too long": "The model reads small words. " * 60,
}


def encode_one(encoder: Encoder, value: TextInput, truncate: bool = True, side: Side = "right") -> TokenBatch:
    return encoder.encode([TokenizeRequest((value,), "truncate" if truncate else "error", side)])


def expected(reference: Any, texts: Sequence[str], side: Side = "right", limit: int = LIMIT) -> list[list[int]]:
    reference.truncation_side = side
    ids: list[list[int]] = reference(list(texts), truncation=True, max_length=limit)["input_ids"]
    return ids


def whole_length(reference: Any, text: str) -> int:
    return len(reference(text, truncation=False)["input_ids"])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_text_has_the_references_ids(encoder: Encoder, reference: Any, text: str, side: Side) -> None:
    batch = encode_one(encoder, text, side=side)
    assert sequences(batch) == expected(reference, [text], side)
    assert batch.input_ids.dtype == batch.cu_seqlens.dtype == batch.cu_requests.dtype == np.int32
    assert batch.token_type_ids is None
    assert batch.truncated.tolist() == [whole_length(reference, text) > LIMIT]


def test_texts_of_several_requests_stay_in_their_order(encoder: Encoder, reference: Any) -> None:
    texts = list(TEXTS.values())
    sides: list[Side] = ["left" if i % 3 else "right" for i in range(len(texts))]
    batch = encoder.encode(
        [TokenizeRequest((text, text), "truncate", side) for text, side in zip(texts, sides, strict=True)]
    )
    wanted = [expected(reference, [text] * 2, side) for text, side in zip(texts, sides, strict=True)]
    assert sequences(batch) == [ids for pair in wanted for ids in pair]
    assert batch.cu_requests.tolist() == list(range(0, 2 * len(texts) + 1, 2))


def test_a_text_that_fits_exactly_is_whole_and_with_one_token_more_is_cut(folder: Path, reference: Any) -> None:
    text = "The model reads small words."
    length = whole_length(reference, text)
    for limit, cut in ((length, False), (length - 1, True)):
        encoder = Encoder(folder, limit)
        batch = encode_one(encoder, text)
        assert sequences(batch) == expected(reference, [text], limit=limit)
        assert batch.truncated.tolist() == [cut]
        assert bool(encode_one(encoder, text, truncate=False).failures) == cut


def test_a_prompt_stands_before_each_text_and_not_before_token_ids(encoder: Encoder, reference: Any) -> None:
    request = TokenizeRequest(("small words", (5, 6), "one vector"), "truncate", prompt="The query: ")
    first, given, second = sequences(encoder.encode([request]))
    assert [first, second] == expected(reference, ["The query: small words", "The query: one vector"])
    assert given == [5, 6]


def truncated_as_the_reference_does(encoder: Encoder, reference: Any, pair: tuple[str, str], side: Side) -> bool:
    """Whether the pair was cut; its ids and types are the reference's."""
    reference.truncation_side = side
    wanted = reference(*pair, truncation=True, max_length=LIMIT, return_token_type_ids=True)
    batch = encode_one(encoder, pair, side=side)
    assert sequences(batch) == [wanted["input_ids"]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == wanted["token_type_ids"]
    (truncated,) = batch.truncated.tolist()
    return bool(truncated)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(1, 1), (3, 60), (60, 3), (60, 50), (50, 60)])
def test_a_pair_has_the_references_ids_and_types(
    encoder: Encoder, reference: Any, lengths: tuple[int, int], side: Side
) -> None:
    first, second = ("the " * n for n in lengths)
    assert truncated_as_the_reference_does(encoder, reference, (first, second), side) is (lengths != (1, 1))


def test_there_are_no_types_where_transformers_gives_none(tmp_path: Path) -> None:
    """Because the class of the tokenizer names none, or its file does."""
    folder = save(wordpiece(), tmp_path / "class")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(str(folder))("small", "words")
    assert encode_one(Encoder(folder, LIMIT), ("small", "words")).token_type_ids is None
    folder = save(wordpiece(), tmp_path / "file", model_input_names=list(TYPED))
    assert encode_one(Encoder(folder, LIMIT), ("small", "words")).token_type_ids is not None


def test_types_are_zero_for_what_is_no_pair(encoder: Encoder, reference: Any) -> None:
    batch = encoder.encode([TokenizeRequest(("small words", ("one", "two")), "truncate")])
    assert batch.token_type_ids is not None
    first = batch.select(0, 1)
    assert first.token_type_ids is not None
    assert first.token_type_ids.tolist() == [0] * len(expected(reference, ["small words"])[0])


def test_an_empty_text_is_its_special_tokens(encoder: Encoder, reference: Any) -> None:
    assert sequences(encode_one(encoder, "")) == expected(reference, [""])


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return Encoder(minilm_folder(), LIMIT)


def test_a_text_without_any_token_is_refused(tmp_path: Path) -> None:
    bare = wordpiece()
    bare.post_processor = None
    encoder = Encoder(save(bare, tmp_path), LIMIT)
    batch = encoder.encode([TokenizeRequest(("", "the"), "truncate"), TokenizeRequest(("the",), "truncate")])
    assert isinstance(batch.failures[0], InvalidInputError)
    assert "inputs[0]" in batch.failures[0].message
    assert batch.cu_requests.tolist() == [0, 0, 1]


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\udfff" * 5, "a \ud83d b"], ids=ascii)
def test_a_lone_surrogate_fails_alone(minilm: Encoder, text: str) -> None:
    good = TokenizeRequest(("good", "better"), "truncate")
    batch = minilm.encode([good, TokenizeRequest(("fine", text), "truncate"), good])
    assert list(batch.failures) == [1]
    assert isinstance(batch.failures[1], InvalidInputError)
    assert text not in batch.failures[1].message
    alone = sequences(minilm.encode([good]))
    assert sequences(batch) == alone * 2
    assert batch.cu_requests.tolist() == [0, 2, 2, 4]


class Panic(BaseException):
    """As pyo3_runtime.PanicException, which is no Exception either."""


@pytest.mark.parametrize("error", [Panic, RuntimeError, MemoryError, KeyError])
@pytest.mark.parametrize("long_texts", ["truncate", "windows"])
def test_a_text_on_which_the_tokenizer_breaks_fails_alone(
    minilm: Encoder, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], long_texts: LongTexts
) -> None:
    """Whatever the tokenizer raises, with few calls for the others, and without the text in the message."""
    calls = []

    def breaking(cls: type, name: str) -> None:
        encode = getattr(cls, name)

        def guarded(self: Any, given: Any, *more: Any) -> Any:
            calls.append(given)
            if "poison" in repr(given):
                raise error("poison")
            return encode(self, given, *more)

        monkeypatch.setattr(cls, name, guarded)

    breaking(BoundedTokenizer, "encode")
    breaking(FramedTokenizer, "encode")
    good = [TokenizeRequest((f"text {i}",), long_texts) for i in range(15)]
    batch = minilm.encode([*good[:4], TokenizeRequest(("fine", "poison"), long_texts), *good[4:]])
    assert list(batch.failures) == [4]
    assert isinstance(batch.failures[4], ModelFailureError)
    assert "poison" not in batch.failures[4].message
    assert batch.num_sequences == 15
    assert len(calls) <= 16


def test_what_ends_the_process_is_nobodys_failure(minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(BoundedTokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        minilm.encode([TokenizeRequest(("text",), "truncate")])


def test_token_ids_of_the_client_are_taken_as_they_are(minilm: Encoder) -> None:
    batch = minilm.encode([TokenizeRequest(((101, 7592, 102), (7592,)), "error")])
    assert sequences(batch) == [[101, 7592, 102], [7592]]
    assert not batch.truncated.any()


@pytest.mark.parametrize(("side", "kept"), [("right", range(LIMIT)), ("left", range(10, LIMIT + 10))])
def test_too_many_token_ids_are_cut_from_their_side(minilm: Encoder, side: Side, kept: range) -> None:
    batch = encode_one(minilm, tuple(range(LIMIT + 10)), side=side)
    assert sequences(batch) == [list(kept)]
    assert batch.truncated.tolist() == [True]


@pytest.mark.parametrize("ids", [(-1,), (30522,), (2**31,), ()])
def test_token_ids_that_the_model_has_not_fail_alone(minilm: Encoder, ids: tuple[int, ...]) -> None:
    batch = minilm.encode([TokenizeRequest(((5,), ids), "truncate"), TokenizeRequest(("good",), "truncate")])
    assert list(batch.failures) == [0]
    assert isinstance(batch.failures[0], InvalidInputError)
    assert "inputs[1]" in batch.failures[0].message
    assert batch.num_sequences == 1


@pytest.mark.parametrize("value", ["small words " * 50, tuple(range(102))], ids=["text", "ids"])
def test_what_is_too_long_is_refused_with_its_count(minilm: Encoder, value: TextInput) -> None:
    batch = minilm.encode([TokenizeRequest(("good", value), "error"), TokenizeRequest(("good",), "error")])
    assert list(batch.failures) == [0]
    assert isinstance(batch.failures[0], InputTooLongError)
    assert "inputs[1]: 102 tokens, and the model takes 24" in batch.failures[0].message


def test_requests_with_and_without_truncation_share_a_call(minilm: Encoder) -> None:
    long = "small words " * 50
    both: tuple[LongTexts, LongTexts] = ("truncate", "error")
    sides: tuple[Side, Side] = ("right", "left")
    kinds = [(long_texts, side) for side in sides for long_texts in both]
    batch = minilm.encode([TokenizeRequest((f"first {long} last",), t, side) for t, side in kinds])
    assert sorted(batch.failures) == [1, 3]
    right, left = sequences(batch)
    assert (right[1], left[-2]) == (2034, 2197)  # "first", "last"


def test_a_call_without_requests_is_an_empty_batch(minilm: Encoder) -> None:
    batch = minilm.encode([])
    assert (batch.num_requests, batch.num_sequences, len(batch.input_ids)) == (0, 0, 0)


def test_threads_with_different_truncation_get_what_one_thread_gets(minilm: Encoder) -> None:
    texts = tuple(f"text {i} " + "of small words " * (i % 40) for i in range(120))
    kinds = [TokenizeRequest(texts, t, side) for t in ("truncate", "error") for side in ("right", "left")]
    kinds[2:] = [replace(kind, inputs=texts[:2]) for kind in kinds[2:]]
    serial = [minilm.encode([kind]) for kind in kinds]
    wrong: list[int] = []
    start = threading.Barrier(len(kinds))

    def work(index: int) -> None:
        start.wait()
        for _ in range(20):
            batch = minilm.encode([kinds[index]])
            if sequences(batch) != sequences(serial[index]) or (batch.truncated != serial[index].truncated).any():
                wrong.append(index)

    threads = [threading.Thread(daemon=True, target=work, args=(i,)) for i in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len({str(sequences(batch)) for batch in serial[:2]}) == 2


def test_the_tokenizer_is_found_where_modules_json_says(tmp_path: Path) -> None:
    save(wordpiece(), tmp_path / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert encode_one(Encoder(tmp_path, LIMIT), "the").num_sequences == 1


@pytest.mark.parametrize("key", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
def test_tokenizer_config_wins_over_tokenizer_json_as_in_transformers(tmp_path: Path, key: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
        shutil.copy(minilm_folder() / name, tmp_path / name)
    _change(tmp_path / "tokenizer_config.json", {key: False})
    text = "Hello naïve 世界 words"
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    reference.backend_tokenizer.no_padding()
    assert sequences(encode_one(Encoder(tmp_path, LIMIT), text)) == expected(reference, [text])
    assert expected(reference, [text]) != sequences(encode_one(Encoder(minilm_folder(), LIMIT), text))


def test_a_prefix_space_of_tokenizer_config_is_added_as_in_transformers(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    _change(tmp_path / "tokenizer_config.json", {"add_prefix_space": True, "tokenizer_class": "RobertaTokenizer"})
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    assert sequences(encode_one(Encoder(tmp_path, LIMIT), "words")) == expected(reference, ["words"])
    assert expected(reference, ["words"]) == expected(reference, [" words"])


def _change(file: Path, change: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(IncompleteModelError, match=r"no tokenizer can be made .*: no vocabulary"):
        Encoder(tmp_path, LIMIT)


def test_a_limit_without_room_for_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_input_tokens"):
        Encoder(minilm_folder(), 2)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(300, 300), (600, 599), (599, 600), (3, 900), (900, 3), (600, 40)])
def test_a_pair_of_long_texts_has_the_references_ids(
    encoder: Encoder, reference: Any, lengths: tuple[int, int], side: Side
) -> None:
    first, second = ("the model reads " * (n // 3) for n in lengths)
    assert truncated_as_the_reference_does(encoder, reference, (first, second), side) is True


def test_a_pair_whose_special_tokens_leave_no_room_is_refused(tmp_path: Path) -> None:
    batch = encode_one(Encoder(save(wordpiece(), tmp_path), 3), ("the model", "small words"))
    assert isinstance(batch.failures[0], InvalidInputError)

"""Long texts are cut before they are tokenized only where that leaves the tokens as they are."""

# ruff: noqa: RUF001  # letters that look like others are what is tested

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers

from serve_app.errors import InputTooLongError, InvalidInputError
from serve_app.tokenizer.bounded import BoundedTokenizer
from serve_app.tokenizer.encoder import Encoder
from serve_app.tokenizer.seams import Seams, seams_of
from serve_app.types import Side, TextPair, TokenizeRequest
from tests.reference import MINILM, minilm_folder
from tests.tokenizer import kinds

LIMIT = 7

FRAGMENTS = re.split(
    r"\|",
    "the|model|small words|don't|they've|x|42|3.14|.|,|;|'|''|``|(|_|!?|"
    " |  |\n|\r\n|\t|\u00a0|\u3000|\u200b|\u2028|▁| ▁|"
    "é|e\u0301|\u0301| \u0301|Å|İ|Σ|ς|ß|ﬁ|²|Ａ|ͺ|ﾞ|ำ|ำ ก|\u0d4e|\u0600|\U000110bd|\ufffd|\ufeff|\x00|\x07|"
    "你|好世|世界，世|你。|，|。|東京|カ|ﾊﾞ|한국|ᄀ|ᅡ|ᆨ|नम|स्ते|مرحبا|ـ|שלום|สวัส|"
    "[MASK]|<mask>|</s>|[SEP]|[CLS|☕|👩‍👩‍👧|🇩🇪|" + "w" * 101,
)
pieces = st.sampled_from([*FRAGMENTS, *[" ", " a "] * 20])
texts = st.lists(pieces | pieces | st.text(max_size=4), min_size=10, max_size=60).map("".join)

WITH_SEAMS = [name for name in (MINILM, *kinds.KINDS) if name != "llama"]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind != MINILM:
        return kinds.KINDS[kind]()
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@functools.cache
def seams_for(kind: str) -> Seams:
    seams = seams_of(tokenizer_of(kind))
    assert seams is not None
    return seams


def plain_ids(kind: str, text: str) -> list[int]:
    ids: list[int] = tokenizer_of(kind).encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("kind", WITH_SEAMS)
@given(text=texts)
def test_the_tokens_of_both_sides_of_a_seam_are_those_of_the_whole(kind: str, text: str) -> None:
    whole = plain_ids(kind, text)
    for seam in seams_for(kind).pattern.finditer(text):
        assert plain_ids(kind, text[: seam.start()]) + plain_ids(kind, text[seam.start() :]) == whole


@functools.cache
def bounded(kind: str, side: Side | None) -> BoundedTokenizer:
    return BoundedTokenizer(tokenizer_of(kind), LIMIT, side)


@functools.cache
def uncut(kind: str, side: Side) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_of(kind).to_str())
    tokenizer.enable_truncation(LIMIT, direction=side)
    return tokenizer


def told(encodings: Sequence[Encoding]) -> list[Any]:
    return [(e.ids, e.type_ids, bool(e.overflowing)) for e in encodings]


def kept(kind: str, side: Side, texts: Sequence[str | TextPair]) -> list[Any]:
    """The same of what the bounded tokenizer keeps, which never lets the tokenizer itself cut."""
    tokenizer = bounded(kind, side)
    encodings = tokenizer.encode(texts)
    assert not any(encoding.overflowing for encoding in encodings)
    return [dataclasses.astuple(tokenizer.kept(encoding)) for encoding in encodings]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [*WITH_SEAMS, "llama"])
@given(several=st.lists(texts, min_size=1, max_size=3))
def test_what_is_kept_of_a_text_is_what_is_kept_of_it_uncut(kind: str, side: Side, several: list[str]) -> None:
    assert kept(kind, side, several) == told(uncut(kind, side).encode_batch(several))


@pytest.mark.parametrize("kind", [*WITH_SEAMS, "llama"])
@given(text=texts)
@settings(max_examples=50)
def test_without_truncation_a_text_is_whole_or_known_to_be_too_long(kind: str, text: str) -> None:
    (encoding,) = bounded(kind, None).encode([text * 8])
    whole = tokenizer_of(kind).encode(text * 8).ids
    assert encoding.ids == whole or LIMIT < len(encoding) < len(whole)
    if bounded(kind, None).reads_all(len(text * 8)):
        assert encoding.ids == whole


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", WITH_SEAMS)
def test_of_a_very_long_text_only_a_part_is_read(kind: str, side: Side) -> None:
    text = "The model reads a long line. " * 4000
    (read,) = bounded(kind, side).encode([text])
    assert len(read) < 1000
    assert kept(kind, side, [text]) == told(uncut(kind, side).encode_batch([text]))
    (refused,) = bounded(kind, None).encode([text])
    assert LIMIT < len(refused) < 1000


@pytest.mark.parametrize("side", ["right", "left"])
def test_more_is_read_where_a_part_has_too_few_tokens(side: Side) -> None:
    """BERT makes one token of a word of 5,000 letters."""
    text = " ".join("w" * 5000 for _ in range(40)) + " the model" * 40
    assert kept(MINILM, side, [text, "x"]) == told(uncut(MINILM, side).encode_batch([text, "x"]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_is_known_to_be_cut_where_its_part_has_just_enough_tokens(side: Side) -> None:
    words = ["the", "model", "reads", "small", "w" * 120, "words"]
    text = " ".join(words if side == "right" else reversed(words))
    assert kept(MINILM, side, [text]) == told(uncut(MINILM, side).encode_batch([text]))
    assert kept(MINILM, side, [text])[0][-1]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", ["w" * 5000, "!?" * 2000, "  " * 2000, "字" * 3000, "a,b\n" * 1000], ids=ascii)
def test_a_text_without_spaces_is_read_too(text: str, side: Side) -> None:
    assert kept(MINILM, side, [text]) == told(uncut(MINILM, side).encode_batch([text]))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [*WITH_SEAMS, "llama"])
@given(first=texts, second=texts)
@settings(max_examples=50)
def test_what_is_kept_of_a_pair_is_what_the_tokenizer_keeps(kind: str, side: Side, first: str, second: str) -> None:
    pair = (first, second[: len(second) // 2])
    assert kept(kind, side, [pair, pair[::-1]]) == told(uncut(kind, side).encode_batch([pair, pair[::-1]]))


def test_pairs_are_read_in_full() -> None:
    pair = ("the model " * 500, "small words " * 400)
    assert kept(MINILM, "right", [pair]) == told(uncut(MINILM, "right").encode_batch([pair]))


def test_what_is_not_unicode_is_refused_wherever_it_stands() -> None:
    encoder = Encoder(minilm_folder(), LIMIT)
    batch = encoder.encode(
        [TokenizeRequest(("the model " * 500 + "\ud800",), "truncate"), TokenizeRequest(("good",), "truncate")]
    )
    assert list(batch.failures) == [0]
    assert isinstance(batch.failures[0], InvalidInputError)


def test_a_refusal_says_at_least_where_not_all_was_read() -> None:
    encoder = Encoder(minilm_folder(), LIMIT)
    some, many = ("small words " * n for n in (18, 100_000))
    refusals = encoder.encode([TokenizeRequest((text,), "error") for text in (some, many)]).failures
    assert all(isinstance(error, InputTooLongError) for error in refusals.values())
    assert "inputs[0]: 38 tokens" in refusals[0].message
    assert "inputs[0]: at least 4" in refusals[1].message


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("two words"),
        AddedToken("word "),
        AddedToken("世界"),
        AddedToken("word", single_word=True),
        AddedToken("word", rstrip=True),
        AddedToken("世", normalized=True),
    ],
    ids=str,
)
def test_an_added_token_that_could_reach_across_a_seam_rules_seams_out(token: AddedToken) -> None:
    tokenizer = kinds.wordpiece()
    tokenizer.add_tokens([token])
    assert seams_of(tokenizer) is None


@pytest.mark.parametrize("token", [AddedToken("   "), AddedToken("<x>", lstrip=True), AddedToken("a-b")], ids=str)
def test_other_added_tokens_do_not(token: AddedToken) -> None:
    tokenizer = kinds.byte_level()
    tokenizer.add_tokens([token])
    assert seams_of(tokenizer) is not None


UNKNOWN = {
    "no pre-tokenizer": (None, None),
    "one piece": (None, pre_tokenizers.Metaspace(split=False)),
    "bytes in one piece": (None, pre_tokenizers.ByteLevel(use_regex=False)),
    "another pattern": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\w+\s?"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        ),
    ),
    "punctuation first": (None, pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])),
    "a space is stripped that tells words": (normalizers.Strip(), pre_tokenizers.ByteLevel()),
    "letters become spaces": (normalizers.Replace("x", " "), pre_tokenizers.Metaspace()),
    "a pattern is replaced": (normalizers.Replace(Regex(r"\s\w"), ""), pre_tokenizers.Metaspace()),
    "something is put before": (normalizers.Prepend("x"), pre_tokenizers.Metaspace()),
}


@pytest.mark.parametrize(("normalizer", "pre_tokenizer"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_tokenizer_with_an_unknown_part_has_no_seams(normalizer: Any, pre_tokenizer: Any) -> None:
    tokenizer = kinds.llama()
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    assert seams_of(tokenizer) is None

"""Pieces of text together are the whole text, whatever the tokenizer and the tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from serve_app.model.generation.loader import SlowDecoder, load_decoder
from serve_app.model.generation.text import Detokenizer, StopTexts, text_of
from tests.tokenizer.kinds import CORPUS, KINDS
from tests.tokenizer.sentencepieces import save_marian

DECODERS: Mapping[str, Any] = {
    "byte-level": decoders.ByteLevel(),
    "qwen": decoders.ByteLevel(),
    "xlm-roberta": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
}
GENERATING = tuple(DECODERS)


@cache
def tokenizer_of(kind: str) -> Any:
    tokenizer = KINDS[kind]()
    if kind == "llama":
        tokenizer = with_byte_tokens(tokenizer)
    tokenizer.decoder = DECODERS[kind]
    return tokenizer


def with_byte_tokens(tokenizer: Any) -> Any:
    """So that characters it does not know are spelled in bytes, as real ones do."""
    told = json.loads(tokenizer.to_str())
    vocabulary = told["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    return Tokenizer.from_str(json.dumps(told))


def pieces(kind: str, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer_of(kind))
    return [*map(detokenizer.push, tokens), detokenizer.finish()]


@pytest.mark.parametrize("kind", GENERATING)
@settings(max_examples=200)
@given(data=st.data())
def test_pieces_of_any_tokens_are_the_decoded_whole(kind: str, data: st.DataObject) -> None:
    size = tokenizer_of(kind).get_vocab_size()
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    assert "".join(pieces(kind, tokens)) == tokenizer_of(kind).decode(tokens, skip_special_tokens=True)


def test_bytes_with_a_special_token_between_them_are_one_run() -> None:
    tokenizer = tokenizer_of("llama")
    tokens = [tokenizer.token_to_id(token) for token in ("<0x00>", "<unk>", "<0x80>")]
    tokens[1] = next(id for id in range(tokenizer.get_vocab_size()) if tokenizer.decode([id]) == "")
    assert "".join(pieces("llama", tokens)) == tokenizer.decode(tokens) == "\ufffd\ufffd"


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("text", [*CORPUS, "👩‍👩‍👧 e\u0301 \r\n\t x", "", "a" * 300])
def test_pieces_of_a_text_are_the_decoded_whole(kind: str, text: str) -> None:
    tokens = tokenizer_of(kind).encode(text).ids
    assert "".join(pieces(kind, tokens)) == tokenizer_of(kind).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_half_a_character_is_held_back(kind: str) -> None:
    found = pieces(kind, tokenizer_of(kind).encode("☕ 👩 你").ids)
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(found).strip() == "☕ 👩 你"


def test_most_text_comes_with_its_own_token() -> None:
    found = pieces("byte-level", tokenizer_of("byte-level").encode(CORPUS[0], add_special_tokens=False).ids)
    assert all(found[:-1])
    assert found[-1] == ""


def stopped(stops: tuple[str, ...], parts: list[str]) -> tuple[list[str], bool]:
    texts = StopTexts(stops)
    out = []
    for part in parts:
        cut = texts.push(part)
        out.append(cut.text)
        if cut.stopped:
            return out, True
    return [*out, texts.finish()], False


def test_text_that_may_become_a_stop_text_is_held_back() -> None:
    assert stopped(("END",), ["a E", "N", "x E", "ND b"]) == (["a ", "", "ENx ", ""], True)


def test_what_was_held_back_comes_at_the_end() -> None:
    assert stopped(("END",), ["a EN"]) == (["a ", "EN"], False)


def test_the_first_of_several_stop_texts_counts() -> None:
    assert stopped(("cd", "b"), ["abcd"]) == (["a"], True)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stopping_piece_by_piece_is_stopping_in_the_whole(text: str, stops: list[str], size: int) -> None:
    parts, was_stopped = stopped(tuple(stops), [text[i : i + size] for i in range(0, len(text), size)])
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert was_stopped == bool(ends)
    if not ends:
        assert "".join(parts) == text
    else:
        assert text.startswith("".join(parts))
        assert not any(stop in "".join(parts) for stop in stops)


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("marian")
    save_marian(folder, 64)
    (folder / "config.json").write_text('{"model_type": "marian"}')
    return load_decoder(folder)


@settings(max_examples=200)
@given(data=st.data())
def test_pieces_of_a_slow_tokenizer_are_the_decoded_whole(marian: Any, data: st.DataObject) -> None:
    assert isinstance(marian, SlowDecoder)
    tokens = data.draw(st.lists(st.integers(0, 190), max_size=40))
    detokenizer = Detokenizer(marian)
    told = [*map(detokenizer.push, tokens), detokenizer.finish()]
    assert "".join(told) == marian.decode(tokens, skip_special_tokens=True)
    assert len(tokens) < 30 or sum(map(bool, told)) > 3


def test_a_token_has_the_bytes_that_it_stands_for() -> None:
    """By hand: half a character, a space before a word, a special token."""
    level = tokenizer_of("byte-level")
    snow = level.encode("☃", add_special_tokens=False).ids
    assert len(snow) > 1
    assert b"".join(part_of(level, i) for i in snow) == "☃".encode()
    assert "\ufffd".encode() not in [part_of(level, i) for i in snow]

    llama = tokenizer_of("llama")
    assert [part_of(llama, llama.token_to_id(f"<0x{byte:02X}>")) for byte in "é".encode()] == [b"\xc3", b"\xa9"]
    word = next(i for token, i in sorted(llama.get_vocab().items()) if re.fullmatch("▁[a-z]+", token))
    assert part_of(llama, word) == llama.id_to_token(word).replace("▁", " ").encode()


@pytest.mark.parametrize("kind", ["byte-level", "qwen", "llama"])
@pytest.mark.parametrize("text", ["the small words", "naïve ☕ and \U0001f600!", "two\n\nlines"])
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id("<unk>") not in tokens, "the tokenizer knows all of the text"
    whole = b"".join(part_of(tokenizer, i) for i in tokens)
    assert whole.removeprefix(b" ") == tokenizer.decode(tokens).encode().removeprefix(b" ")


def part_of(tokenizer: Any, token: int) -> bytes:
    text, part = text_of(token, tokenizer)
    return text.encode() if part is None else part

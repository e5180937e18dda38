"""Tokens of texts of any length, from the windows that a tokenizer replica answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy.examples.make_tiny_models import unigram, wordpiece
from serve_app.errors import BatchTooLargeError, InvalidInputError
from serve_app.ingress.service import TextToken
from serve_app.ingress.words import MOST_TOKENS, text_tokens, texts_of, whole_texts
from serve_app.tasks.vocabulary import Vocabulary
from serve_app.tokenizer.encoder import Encoder
from tests.tokenizer.kinds import byte_level

TEXTS = ("a small cat", "naïve café, élève, 42 times", "what is a kitten? " * 40)


@pytest.fixture(scope="module", params=[wordpiece, unigram], ids=["framed by two tokens", "framed by one"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    request.param().save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "bert"}')
    return path


def tokens_of(folder: Path, limit: int, special_tokens: bool) -> list[list[TextToken]]:
    encoder = Encoder(folder, limit)
    batch = encoder.encode([whole_texts(TEXTS)])
    assert not batch.failures
    return text_tokens(TEXTS, batch, Vocabulary.read(encoder.definition), special_tokens)


@pytest.mark.parametrize("special_tokens", [True, False])
@pytest.mark.parametrize("limit", [12, 4000], ids=["in windows", "in one"])
def test_tokens_are_those_of_the_whole_text(folder: Path, limit: int, special_tokens: bool) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    for text, tokens in zip(TEXTS, tokens_of(folder, limit, special_tokens), strict=True):
        assert [t.id for t in tokens] == reference(text, add_special_tokens=special_tokens)["input_ids"]
        assert all(t.text == text.encode()[t.start : t.stop].decode() for t in tokens if not t.special)
        assert all((t.start, t.stop) == (None, None) for t in tokens if t.special)
        assert any(t.special for t in tokens) == special_tokens


def test_places_are_bytes_as_in_text_embeddings_inference(tmp_path: Path) -> None:
    """Its tokenizer counts bytes (core/src/tokenization.rs), and byte-level tokens of one character share its place."""
    PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    encoder, text = Encoder(tmp_path, 64), "Hello ☕ é!"
    (tokens,) = text_tokens([text], encoder.encode([whole_texts([text])]), Vocabulary.read(encoder.definition), True)
    own = [token for token in tokens if not token.special]
    assert {token.text.strip(): (token.start, token.stop) for token in own}["☕"] in ((5, 9), (6, 9))
    assert own[-1] == TextToken(own[-1].id, "!", False, 12, 13)
    assert all(token.text == text.encode()[token.start : token.stop].decode() for token in own)


def test_more_tokens_than_one_answer_may_have_are_refused_before_any_is_made(folder: Path) -> None:
    encoder = Encoder(folder, 64)
    few = encoder.encode([whole_texts(TEXTS)])
    many = replace(few, input_ids=np.zeros(MOST_TOKENS + 1, np.int32))
    with pytest.raises(BatchTooLargeError, match=f"at most {MOST_TOKENS}"):
        text_tokens(TEXTS, many, Vocabulary.read(encoder.definition), True)


def test_ids_become_text_with_and_without_special_tokens(folder: Path) -> None:
    vocabulary = Vocabulary.read(Encoder(folder, 64).definition)
    ids = tuple(AutoTokenizer.from_pretrained(folder)("a small cat")["input_ids"])
    plain, whole = (texts_of([ids], vocabulary, skip)[0] for skip in (True, False))
    assert plain.split() == ["a", "small", "cat"]
    assert len(whole) > len(plain)


def test_an_id_beyond_all_vocabularies_is_refused(folder: Path) -> None:
    vocabulary = Vocabulary.read(Encoder(folder, 64).definition)
    with pytest.raises(InvalidInputError, match="too large"):
        texts_of([(2**40,)], vocabulary, True)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from serve_app.cli.bench.corpus import draw_lengths, make_corpus, single_token_words
from serve_app.errors import ConfigError


@pytest.mark.parametrize("seed", [0, 1])
def test_lengths_have_the_quantiles_of_real_traffic(minilm: Path, seed: int) -> None:
    tokens = make_corpus(minilm, 1000, seed).tokens

    assert np.median(tokens) == pytest.approx(40, abs=1)
    assert np.percentile(tokens, 99) == pytest.approx(300, abs=10)
    assert max(tokens) <= 512
    assert min(tokens) >= 3


def test_a_small_corpus_has_them_too() -> None:
    lengths = draw_lengths(64, np.random.default_rng(0))

    assert np.median(lengths) == pytest.approx(40, abs=2)
    assert max(lengths) > 200


def test_long_texts_do_not_come_in_a_row() -> None:
    """A part of the corpus is like the whole."""
    lengths = draw_lengths(1024, np.random.default_rng(0))

    assert np.mean(lengths[:512]) == pytest.approx(np.mean(lengths), rel=0.2)


def test_token_counts_are_what_the_model_counts(minilm: Path) -> None:
    corpus = make_corpus(minilm, 50)
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    assert list(corpus.tokens) == [len(tokenizer.encode(text).ids) for text in corpus.texts]


def test_the_same_seed_makes_the_same_texts(minilm: Path) -> None:
    assert make_corpus(minilm, 20, seed=3) == make_corpus(minilm, 20, seed=3)
    assert make_corpus(minilm, 20, seed=3) != make_corpus(minilm, 20, seed=4)


def test_texts_are_as_long_in_characters_as_english_ones(minilm: Path) -> None:
    """About 4 to 6 characters a token, or the bytes that a server moves and tokenizes would not be those of texts."""
    corpus = make_corpus(minilm, 200)

    assert 4 < sum(map(len, corpus.texts)) / sum(corpus.tokens) < 6


def test_what_is_cut_is_not_counted_as_computed(minilm: Path) -> None:
    corpus = make_corpus(minilm, 200)

    assert max(corpus.computed_tokens(256)) == 256
    assert corpus.computed_tokens(512) == list(corpus.tokens)


def test_a_tokenizer_without_english_is_refused() -> None:
    with pytest.raises(ConfigError, match="English words"):
        single_token_words(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: missing"):
        make_corpus(tmp_path, 10)

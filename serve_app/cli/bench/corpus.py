"""Texts whose lengths are those of real traffic, made of words that are one token each, from a seed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from tokenizers import Tokenizer

from serve_app.errors import ConfigError
from serve_app.tasks.card import transformer_folder

MEDIAN_TOKENS, P99_TOKENS, MOST_TOKENS = 40, 300, 512
"""Lengths are log-normal, as those of texts that people search for and with; special tokens are counted."""

_WORD = re.compile(r"[a-z]{1,12}")
_WORD_START = "\u2581\u0120"
"""What sentencepiece and byte-level vocabularies write for the space before a word."""
_FEWEST_WORDS = 100
_ZIPF_SHIFT = 2.7
"""Zipf-Mandelbrot: the n-th most frequent word has frequency 1 / (n + 2.7)."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """`tokens[i]` counts text i's tokens, special ones included, before any truncation."""

    texts: tuple[str, ...]
    tokens: tuple[int, ...]

    def computed_tokens(self, max_input_tokens: int) -> list[int]:
        """Tokens of each text that a model which cuts at `max_input_tokens` computes."""
        return [min(tokens, max_input_tokens) for tokens in self.tokens]


def make_corpus(model_path: Path, size: int, seed: int = 0) -> Corpus:
    """`size` texts for the model in `model_path`; the same arguments make the same texts.

    Lengths are the quantiles of the distribution in random order, so that any corpus has its median and its tail.
    Raises ConfigError if the model's tokenizer.json is missing or has too few words of one token.
    """
    generator = np.random.default_rng(seed)
    texts = make_texts(model_path, draw_lengths(size, generator), seed)
    return Corpus(tuple(texts), tuple(len(e.ids) for e in _load_tokenizer(model_path).encode_batch_fast(texts)))


def make_texts(model_path: Path, tokens: Sequence[int], seed: int = 0) -> list[str]:
    """Texts of exactly so many tokens each (special ones included), as far as the tokenizer's words allow."""
    tokenizer = _load_tokenizer(model_path)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    counts = [max(1, length - special) for length in tokens]
    return _write(single_token_words(tokenizer), counts, np.random.default_rng(seed))


def draw_lengths(size: int, generator: np.random.Generator) -> list[int]:
    """Tokens of each text, special ones included."""
    sigma = math.log(P99_TOKENS / MEDIAN_TOKENS) / NormalDist().inv_cdf(0.99)
    normal = NormalDist(math.log(MEDIAN_TOKENS), sigma)
    lengths = [min(MOST_TOKENS, round(math.exp(normal.inv_cdf((i + 0.5) / size)))) for i in range(size)]
    return [lengths[i] for i in generator.permutation(size)]


def single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Lower-case words that are one token, in the vocabulary's order, which is about that of their frequency."""
    by_id = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    candidates = list(dict.fromkeys(token.lstrip(_WORD_START) for token, _ in by_id))
    candidates = [word for word in candidates if _WORD.fullmatch(word)]
    encodings = tokenizer.encode_batch_fast([f"a {word}" for word in candidates], add_special_tokens=False)
    words = [word for word, encoding in zip(candidates, encodings, strict=True) if len(encoding.ids) == 2]
    if len(words) < _FEWEST_WORDS:
        raise ConfigError(
            f"the tokenizer has {len(words)} English words of one token, too few to make texts of ({_FEWEST_WORDS})"
        )
    return words


def _write(words: Sequence[str], counts: Sequence[int], generator: np.random.Generator) -> list[str]:
    frequency = 1.0 / (np.arange(len(words), dtype=np.float64) + _ZIPF_SHIFT)
    drawn = iter(generator.choice(len(words), size=sum(counts), p=frequency / frequency.sum()))
    return [" ".join(words[next(drawn)] for _ in range(count)) for count in counts]


def _load_tokenizer(model_path: Path) -> Tokenizer:
    file = transformer_folder(model_path) / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{file}: missing; the benchmark's texts are made with the model's fast tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

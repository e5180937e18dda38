"""Small tokenizers of every kind that encoders use, trained here on a few lines and saved as a real one would be."""

# ruff: noqa: RUF001  # letters that look like others are what is tested

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from serve_app.types import TokenBatch

CORPUS = (
    "The model reads a long line of small words, and gives back one vector for each text it was sent.",
    "It's a test; they've said: don't stop (yet) — 42 times, 3.14 or 2,718!",
    "Größe, naïve café, élève, señor, Ångström, İstanbul, ΣΊΣΥΦΟΣ, ёлка и мир.",
    "你好，世界。模型读取文字。東京都 カタカナ ひらがな 한국어 문장",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "def f(x):\n    return x  # spaces   and\ttabs\r\n",
    "fi ffi one two three ``quoted'' 'single' \"double\" ☕ 👩‍👩‍👧 e\u0301",
)
VOCABULARY_SIZE = 420
LIMIT = 24
"""Tokens of the encoders under test."""

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_COMPATIBLE = {
    "ﬁ": "fi",
    "²": "2",
    "Ａ": "A",
    "ͺ": " ι",
    "\u3000": " ",
    "\n": " ",
    "\t": " ",
    "e\u0301": "é",
    "\x07": "",
}
"""Some of what SentencePiece's NFKC rules map."""


def wordpiece(lowercase: bool = True) -> Tokenizer:
    """BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special))
    return _framed(tokenizer, "[CLS]", "[SEP]")


def byte_level(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    """RoBERTa, and what came after it. `<mask>` takes the space before it."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY_SIZE + len(alphabet)
    _train(tokenizer, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    return _framed(tokenizer, "<s>", "</s>")


def qwen() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(normalizers.NFC(), pre_tokenizers.Sequence([split, byte_pieces]))


def unigram(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """What SentencePiece makes: XLM-R, T5, ALBERT."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
    _train(tokenizer, trainers.UnigramTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special, unk_token="<unk>"))
    return _framed(tokenizer, "<s>", "</s>")


def xlm_roberta() -> Tokenizer:
    spaces = normalizers.Replace(Regex(" {2,}"), "▁")
    normalizer = normalizers.Sequence([precompiled(_COMPATIBLE), normalizers.Strip(left=False, right=True), spaces])
    return unigram(normalizer, pre_tokenizers.Metaspace(prepend_scheme="always"))


def xlm_roberta_of_words() -> Tokenizer:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    return unigram(precompiled(_COMPATIBLE), words)


def albert() -> Tokenizer:
    steps = [
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        precompiled(_COMPATIBLE),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
    return unigram(normalizers.Sequence(steps), pre_tokenizers.Metaspace(prepend_scheme="first"))


def llama() -> Tokenizer:
    """Merges across spaces: no place of a text is sure to be a border between tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    _train(tokenizer, trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special))
    return _framed(tokenizer, "<s>", "</s>")


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "wordpiece": wordpiece,
    "wordpiece-cased": lambda: wordpiece(lowercase=False),
    "byte-level": byte_level,
    "byte-level-prefix-space": lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte-level-nfc": lambda: byte_level(normalizers.NFC()),
    "qwen": qwen,
    "xlm-roberta": xlm_roberta,
    "xlm-roberta-of-words": xlm_roberta_of_words,
    "albert": albert,
    "llama": llama,
}


TYPED = ("input_ids", "token_type_ids", "attention_mask")
"""Inputs of models that are given token types."""


def save(tokenizer: Tokenizer, folder: Path, **keys: Any) -> Path:
    """The files that a model with this tokenizer has, for Encoder and for transformers' AutoTokenizer."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **keys).save_pretrained(folder)
    return folder


def precompiled(rules: Mapping[str, str]) -> normalizers.Precompiled:
    """SentencePiece's normalization rules in their binary form: a double-array trie, then the replacements.

    Every node of the trie has 256 units of its own, which is wasteful and simple. The layout of a unit is that of
    https://github.com/s-yata/darts-clone.
    """
    replacements = bytearray()
    units: list[int] = [_offset(256)] + [0] * 511
    for text, replacement in rules.items():
        node = 256
        for byte in text.encode():
            position = node ^ byte
            if not units[position]:
                units[position] = byte | _offset(position ^ len(units))
                units.extend([0] * 256)
            parent, node = position, position ^ _offset_of(units[position])
        units[parent] |= 1 << 8
        units[node] = len(replacements) | 1 << 31
        replacements += replacement.encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return normalizers.Precompiled(struct.pack("<I", len(trie)) + trie + bytes(replacements))


def _offset(value: int) -> int:
    return value << 10


def _offset_of(unit: int) -> int:
    return unit >> 10


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(_lines(), trainer)


def _lines() -> Iterator[str]:
    for line in CORPUS:
        yield from [line] * 3


def _framed(tokenizer: Tokenizer, start: str, end: str) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B:1 {end}:1", special_tokens=ids
    )
    return tokenizer


def sequences(batch: TokenBatch) -> list[list[int]]:
    return [batch.select(i, i + 1).input_ids.tolist() for i in range(batch.num_sequences)]

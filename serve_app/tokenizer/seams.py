"""Where a long text can be cut before it is tokenized, and the tokens stay what they are.

A seam is a place p of a text t where tokens(t) = tokens(t[:p]) + tokens(t[p:]), special tokens aside. So a part of the
text from its start to a seam, or from a seam to its end, has the first or the last tokens of the whole. Whether a place
is a seam is told by the characters beside it, for tokenizers that are made of the parts known here:

- Added tokens are looked for first. None may match across a seam: those that hold white space beside other characters,
  that look at their neighbours (`single_word`) or take white space behind them (`rstrip`) rule seams out.
- The normalizer works character by character, or reaches no further than to what combines with a character. The seam
  is before an ASCII space, which begins a new cluster and composes with nothing, between letters or ASCII signs, which
  neither combine with a space nor have one in their compatibility forms. BERT's normalizer turns other white space
  into spaces and puts spaces around ideographs, so that there are seams too.
- The pre-tokenizer always splits before a space that follows another character, and puts that space at the start of
  the next piece or drops it. Every model (WordPiece, BPE, Unigram) then works on each piece by itself.

A tokenizer that merges across spaces, or has a part that is not known here, has no seams.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Part: TypeAlias = Mapping[str, Any]
"""A normalizer or pre-tokenizer as tokenizer.json writes it."""

_LETTERS = (
    "!-~"  # ASCII
    "\u00c0-\u02af"  # Latin
    "\u0386-\u0481\u048a-\u052f"  # Greek, Cyrillic
    "\u05d0-\u05ea\u0620-\u064a"  # Hebrew, Arabic
    "\u0904-\u0939\u0e01-\u0e30"  # Devanagari, Thai
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"  # Kana, ideographs, Hangul
)
_IDEOGRAPHS = "\u4e00-\u9fff"

BEFORE_SPACE = rf"(?<=[{_LETTERS}])(?= [{_LETTERS}])"
BEFORE_WHITE_SPACE = rf"(?<=[{_LETTERS}])(?=[ \t\r\n][{_LETTERS}])"
BETWEEN_IDEOGRAPHS = f"(?<=[{_IDEOGRAPHS}])(?=[{_IDEOGRAPHS}])"
BEFORE_FULL_WIDTH_SIGN = f"(?<=[{_IDEOGRAPHS}])(?=[\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b])"

_REACHING_NO_SPACE = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Precompiled", "Strip", "StripAccents"}
)
_DROPPING_SPACE = (["BertPreTokenizer"], ["Whitespace"], ["WhitespaceSplit"])
_SPLITTING_BEFORE_SPACE = frozenset(
    {
        # Qwen 2 and 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)


@dataclass(frozen=True, slots=True)
class Seams:
    """The seams of texts for one tokenizer: the empty matches of `pattern`."""

    pattern: re.Pattern[str]

    def start_of(self, text: str, characters: int) -> str:
        """The text up to the first seam that leaves at least so many characters, or all of it."""
        seam = self.pattern.search(text, characters)
        return text if seam is None else text[: seam.start()]

    def end_of(self, text: str, characters: int) -> str:
        """The text from a seam that leaves at least so many characters, and not many more, or all of it."""
        stop, reach = len(text) - characters, 1 + characters // 8
        while stop > 0:
            start = max(0, stop - reach)
            # A search looks at characters before `start`, but not behind the end it is given.
            seam = self.pattern.search(text, start, stop + 2)
            if seam is not None and seam.start() <= stop:
                return text[seam.start() :]
            stop, reach = start, 2 * reach
        return text


def seams_of(tokenizer: Tokenizer) -> Seams | None:
    """The seams that texts have for this tokenizer, or None where none are sure."""
    normalizers = list(_parts(tokenizer.normalizer, "normalizers"))
    pre_tokenizers = list(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
    patterns = _patterns(normalizers, pre_tokenizers)
    if not patterns:
        return None
    seams = Seams(re.compile("|".join(patterns)))
    return seams if all(_lets_cut(tokenizer, token, seams) for token in _added_tokens(tokenizer)) else None


def _parts(part: Any, name: str) -> Iterator[Part]:
    """The parts of a normalizer or pre-tokenizer, sequences spread out."""
    if part is not None:
        yield from _spread(json.loads(part.__getstate__()), name)


def _spread(part: Part, name: str) -> Iterator[Part]:
    if part["type"] == "Sequence":
        for member in part[name]:
            yield from _spread(member, name)
    else:
        yield part


def _patterns(normalizers: list[Part], pre_tokenizers: list[Part]) -> list[str]:
    if _kinds(normalizers) == ["BertNormalizer"] and _kinds(pre_tokenizers) == ["BertPreTokenizer"]:
        spaced = normalizers[0]["handle_chinese_chars"]
        return [BEFORE_WHITE_SPACE, BETWEEN_IDEOGRAPHS] if spaced else [BEFORE_WHITE_SPACE]
    if not all(_reaches_no_space(part) for part in normalizers):
        return []
    strips = any(part["type"] == "Strip" and part["strip_left"] for part in normalizers)
    if _splits_words(pre_tokenizers):
        return [] if strips and _tells_words_by_place(pre_tokenizers) else [BEFORE_SPACE]
    if _is_byte_level(pre_tokenizers) and not strips:
        plain = set(_kinds(normalizers)) <= {"NFC"} and not pre_tokenizers[0].get("add_prefix_space")
        return [BEFORE_SPACE, BEFORE_FULL_WIDTH_SIGN] if plain else [BEFORE_SPACE]
    return []


def _kinds(parts: list[Part]) -> list[str]:
    return [part["type"] for part in parts]


def _reaches_no_space(part: Part) -> bool:
    if part["type"] == "Replace":
        pattern, content = part["pattern"], part["content"]
        if pattern == {"Regex": " {2,}"}:  # a seam has one space
            return content in (" ", "▁")
        return "String" in pattern and not re.search(r"[\s▁]", pattern["String"] + content)
    return part["type"] in _REACHING_NO_SPACE


def _splits_words(pre_tokenizers: list[Part]) -> bool:
    kinds = _kinds(pre_tokenizers)
    return kinds[:1] in _DROPPING_SPACE or (kinds == ["Metaspace"] and pre_tokenizers[0].get("split", True))


def _tells_words_by_place(pre_tokenizers: list[Part]) -> bool:
    """Whether a word's first token depends on what stands before the word, and not on the word alone."""
    return any(part.get("prepend_scheme", "always") != "always" for part in pre_tokenizers)


def _is_byte_level(pre_tokenizers: list[Part]) -> bool:
    kinds = _kinds(pre_tokenizers)
    if kinds == ["ByteLevel"]:
        return bool(pre_tokenizers[0]["use_regex"])
    if kinds != ["Split", "ByteLevel"]:
        return False
    split, byte_level = pre_tokenizers
    known = split["pattern"].get("Regex") in _SPLITTING_BEFORE_SPACE
    return known and split["behavior"] == "Isolated" and not split["invert"] and not byte_level["use_regex"]


def _added_tokens(tokenizer: Tokenizer) -> list[Any]:
    return list(tokenizer.get_added_tokens_decoder().values())


def _lets_cut(tokenizer: Tokenizer, token: Any, seams: Seams) -> bool:
    """Whether this added token can neither match across a seam nor look or reach across one."""
    contents = [token.content]
    if token.normalized and tokenizer.normalizer is not None:
        contents.append(tokenizer.normalizer.normalize_str(token.content))
    spans = any(seams.pattern.search(text) or (re.search(r"\s", text) and not text.isspace()) for text in contents)
    return not (spans or token.single_word or token.rstrip)

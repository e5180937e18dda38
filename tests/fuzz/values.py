"""JSON that json.dumps would not write, and values that a server may stumble over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

Tree: TypeAlias = Any
"""As json.loads gives it, but that objects are `Members`, and that anything may be `Raw`."""


@dataclass(frozen=True)
class Raw:
    """Bytes that are written as they are."""

    written: bytes


class Members(list[tuple[Any, Tree]]):
    """An object; a key may stand in it twice."""


def tree_of(value: Any) -> Tree:
    if isinstance(value, dict):
        return Members((key, tree_of(item)) for key, item in value.items())
    return [tree_of(item) for item in value] if isinstance(value, list) else value


def dump(tree: Tree, ascii_only: bool = True) -> bytes:
    if isinstance(tree, Raw):
        return tree.written
    if isinstance(tree, Members):
        return b"{%s}" % b",".join(b"%s:%s" % (dump(k, ascii_only), dump(v, ascii_only)) for k, v in tree)
    if isinstance(tree, list):
        return b"[%s]" % b",".join(dump(item, ascii_only) for item in tree)
    return json.dumps(tree, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


Place: TypeAlias = tuple[list[Any], int]
"""A list or an object, and where in it."""


def places(tree: Tree) -> list[Place]:
    """Of every value within `tree`."""
    found: list[Place] = []
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, list):
            found += [(node, index) for index in range(len(node))]
            left += [item[1] if isinstance(node, Members) else item for item in node]
    return found


def at(place: Place) -> Tree:
    node, index = place
    return node[index][1] if isinstance(node, Members) else node[index]


def put(place: Place, value: Tree) -> None:
    node, index = place
    node[index] = (node[index][0], value) if isinstance(node, Members) else value


NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    7,
    513,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    2**64,
    10**30,
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.5,
    1e-320,
    1e38,
    3.5e38,
    1.7e308,
    *(Raw(n) for n in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1E+2", b"01", b"+1", b".5", b"0x10")),
    Raw(b"9" * 400),
    Raw(b"9" * 5000),
    Raw(b"0." + b"1" * 5000),
)
BROKEN_TEXTS: tuple[Raw, ...] = tuple(
    Raw(text)
    for text in (
        rb'"\ud800"',
        rb'"\udc00"',
        rb'"a\ud800b"',
        rb'"\udc00\ud800"',
        b'"\xed\xa0\x80"',
        b'"\xff\xfe"',
        b'"\xc0\xaf"',
        b'"\xf0\x9f\x98"',
        b'"\xf4\x90\x80\x80"',
        rb'"\x41"',
        rb'"\u12"',
        b'"\x00"',
        b'"\x01"',
        b'"\n"',
        b'"abc',
        b"'a'",
        b"undefined",
        b"nul",
        b"",
        b"/**/",
    )
)
ODD_TEXTS: tuple[str, ...] = (
    "a",
    " ",
    "\u0000",
    "a\u0000b",
    "\t\r\n\v\f",
    "\u2028\u2029\u0085",
    "naïve café",
    "e\u0301" * 9,
    "o" + "\u0302" * 200,
    "مرحبا بالعالم",
    "\u202eabc\u202c",
    "汉字かな한글",
    "👩‍👩‍👧‍👦🏳️‍🌈" * 3,
    "\U0010ffff\ufffe\uffff",
    "\ufeffbom",
    "\u200b\u200c\u200d",
    "[MASK]",
    "[MASK] and [MASK]",
    "<mask>",
    "[CLS] [SEP] [PAD]",
    "<s></s><pad>",
    "<|endoftext|>",
    "{{ 7 * 7 }}{% raw %}",
    "%s%n%x {0} ${jndi:ldap://a}",
    "' OR 1=1 --",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "x\r\nx-evil: 1",
    "NaN",
    "null",
    "ﬁﬃ ǅ İ ß",
    "0" * 300,
    "word " * 60,
    "unbroken" * 60,
)


def deep(rng: Random) -> Raw:
    levels = rng.choice((5, 30, 63, 64, 65, 127, 500, 20_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return Raw(opened * levels + rng.choice((b"1", b'""', b"[]")) + closed * rng.choice((levels, levels, levels - 1)))


def many(rng: Random) -> Raw:
    item = rng.choice((b'"a"', b"1", b"null", b"[1]", b'["a","b"]', b"{}"))
    return Raw(b"[%s]" % b",".join([item] * rng.choice((33, 400, 2049, 10_000))))


def long_text(rng: Random) -> str:
    unit = rng.choice(("a", "word ", "é", "👩‍👩‍👧", "\u0301", " ", "\n"))
    return unit * (rng.choice((600, 5000, 40_000)) // len(unit))


def hostile(rng: Random, canary: str) -> Tree:
    """A value that does not belong where it is put, most of the time."""
    choices: tuple[tuple[int, Callable[[], Tree]], ...] = (
        (30, lambda: rng.choice(NUMBERS)),
        (25, lambda: rng.choice(BROKEN_TEXTS)),
        (25, lambda: rng.choice(ODD_TEXTS) + rng.choice(("", canary))),
        (20, lambda: rng.choice((None, True, False, "", canary, f"{canary}\r\nx: 1", "true", "1"))),
        (12, lambda: rng.choice(([], Members(), [[]], [Members()], [None], [""], [canary], [[[canary]]]))),
        (10, lambda: Members([(rng.choice((canary, "", "inputs", "__proto__", Raw(rb'"\ud800"'))), canary)])),
        (6, lambda: [canary, 1, None, Members(), [], 2.5, True]),
        (3, lambda: deep(rng)),
        (1, lambda: many(rng)),
        (1, lambda: long_text(rng) + canary),
    )
    (choice,) = rng.choices([make for _, make in choices], [weight for weight, _ in choices])
    return choice()

"""Requests as bytes, each made from nothing but a seed, its target and its number, so that any can be made again."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.fuzz import heads
from tests.fuzz.heads import Head
from tests.fuzz.schemas import Valid, odd_text
from tests.fuzz.targets import Target
from tests.fuzz.values import Members, Tree, at, dump, hostile, places, put, tree_of


@dataclass
class Fuzzed:
    """What is sent, and what may come of it."""

    target: Target
    number: int
    canary: str
    """Stands in its inputs, and must not come back in an error."""
    data: bytes = b""
    kinds: list[str] = field(default_factory=list)
    """What was done to it, in words."""
    broken: bool = False
    """No HTTP: any answer below 500 will do, or none. It gets a connection of its own."""
    half_closes: bool = False
    """The client says that no more comes, though there should."""
    may_be_late: bool = False
    """It asks for an answer within a millisecond, so that 504 is right."""

    @property
    def wants_head_only(self) -> bool:
        return self.data.startswith(b"HEAD ")


def make(target: Target, seed: int, number: int, valid: Valid) -> Fuzzed:
    """The request `number` for `target`: always the same for the same seed."""
    rng = Random(f"{seed} {target.name} {number}")
    request = Fuzzed(target, number, f"cAnarY{rng.getrandbits(40):010x}")
    head = Head.of(target)
    if target.good is not None:
        body = _body(request, head, rng, valid)
        if rng.random() < 0.12:
            body = _mangled(request, body, rng)
    else:
        body = b"" if rng.random() < 0.9 else rng.choice((b"{}", request.canary.encode(), b"\x00"))
    if rng.random() < (0.2 if body else 0.8):
        heads.mutate(request, head, rng)
    request.data = heads.framed(request, head, body, rng)
    return request


def _body(request: Fuzzed, head: Head, rng: Random, valid: Valid) -> bytes:
    tree = _valid(request, rng, valid)
    if rng.random() < 0.55:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            tree = _worse(request, tree, rng)
    else:
        request.kinds.append("valid but odd")
    written = dump(tree, ascii_only=rng.random() < 0.5)
    if request.target.is_open_inference and rng.random() < 0.3:
        return _with_binary(request, head, written, rng)
    return written


def _valid(request: Fuzzed, rng: Random, valid: Valid) -> Tree:
    """The good body with other texts, or any that the schema allows."""
    target = request.target
    good = tree_of(target.good)
    if target.is_open_inference:
        return _valid_tensors(request, good, rng, valid)
    if rng.random() < 0.4:
        for place in places(good):
            if isinstance(at(place), str) and at(place) != target.model and rng.random() < 0.7:
                put(place, odd_text(rng, request.canary))
        return good
    made = valid.value(target.schema or {}, rng, request.canary)
    if "model" in target.good:
        made["model"] = target.good["model"]
    return tree_of(made)


def _valid_tensors(request: Fuzzed, good: Members, rng: Random, valid: Valid) -> Members:
    for _, tensor in [(key, each) for key, tensors in good if key == "inputs" for each in tensors]:
        texts = [odd_text(rng, request.canary) for _ in range(rng.choice((1, 1, 2, 4)))]
        members = dict(tensor) | {"data": texts, "shape": [len(texts)]}
        tensor[:] = list(members.items())
    parameters = valid.value(request.target.parameters or {}, rng, request.canary)
    if rng.random() < 0.5:
        good[:] = [member for member in good if member[0] != "parameters"]
        good.append(("parameters", tree_of({"binary_data_output": rng.random() < 0.3, **parameters})))
    if rng.random() < 0.3:
        good.append(("id", odd_text(rng, request.canary)))
    return good


def _worse(request: Fuzzed, tree: Tree, rng: Random) -> Tree:
    """`tree` with one thing changed."""
    found = places(tree)
    if not found:
        return hostile(rng, request.canary)
    place = rng.choice(found)
    node, index = place
    what = rng.choice(("value", "value", "value", "value", "gone", "twice", "unknown", "in a list", "out", "root"))
    request.kinds.append(f"a member: {what}")
    if what == "gone":
        del node[index]
    elif what == "twice":
        key_or_value = node[index]
        again = (key_or_value[0], hostile(rng, request.canary)) if isinstance(node, Members) else key_or_value
        node.insert(rng.choice((index, index + 1)), again)
    elif what == "unknown" and isinstance(node, Members):
        node.insert(index, (rng.choice((request.canary, "unknown", "")), hostile(rng, request.canary)))
    elif what == "in a list":
        put(place, [at(place)] * rng.choice((1, 1, 2, 40)))
    elif what == "out" and isinstance(at(place), list) and at(place):
        put(place, rng.choice([at((at(place), i)) for i in range(len(at(place)))]))
    elif what == "root" and rng.random() < 0.3:
        return hostile(rng, request.canary)
    else:
        put(place, hostile(rng, request.canary))
    return tree


def _mangled(request: Fuzzed, body: bytes, rng: Random) -> bytes:
    """`body` with bytes changed, regardless of what they mean."""
    raw = bytearray(body)
    request.kinds.append("bytes")
    for _ in range(rng.randint(1, 4)):
        if not raw:
            break
        start = rng.randrange(len(raw))
        what = rng.choice(("flip", "flip", "cut", "insert", "drop", "again", "swap"))
        if what == "flip":
            raw[start] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del raw[start:]
        elif what == "insert":
            raw[start:start] = rng.choice((b"\x00", b"\xff", b'"', b"\\", b"{", b"]", b",", b"\\u", rng.randbytes(3)))
        elif what == "drop":
            del raw[start : start + rng.randint(1, 8)]
        elif what == "again":
            raw[start:start] = raw[start : start + rng.randint(1, 40)]
        else:
            raw[start:] = raw[start:][::-1]
    return bytes(raw)


def _with_binary(request: Fuzzed, head: Head, written: bytes, rng: Random) -> bytes:
    """As Triton's binary tensors, some of them as they should be."""
    texts = [odd_text(rng, request.canary).encode("utf-8", "surrogatepass") for _ in range(rng.choice((1, 1, 2, 3)))]
    binary = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    right = rng.random() < 0.5
    request.kinds.append("binary tensors" if right else "odd binary tensors")
    if not right:
        binary = rng.choice((binary[:-1], binary[1:], binary + b"\x00", b"", rng.randbytes(40), b"\xff" * 8))
    told: Any = len(binary) if right else rng.choice((len(binary), 0, 3, -1, 2**31, 2**63, len(binary) + 1, "4"))
    names = [each["name"] for each in request.target.good["inputs"]]
    inputs = [
        {"name": name, "shape": [len(texts)], "datatype": "BYTES", "parameters": {"binary_data_size": told}}
        for name in names
    ]
    if right or rng.random() < 0.7:
        written = dump(tree_of({"inputs": inputs, "parameters": {"binary_data_output": rng.random() < 0.5}}))
        binary = binary * len(names)
    if not right:
        for _ in range(rng.choice((0, 0, 1))):
            written = _mangled(request, written, rng)
    length = len(written) if right else rng.choice((len(written), len(written), 0, 1, -1, 10**9, "x", ""))
    head.set(b"inference-header-content-length", str(length).encode())
    head.set(b"content-type", b"application/octet-stream")
    return written + binary

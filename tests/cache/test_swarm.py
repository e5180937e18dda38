from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve_app.cache.swarm import STRIKES, UPLOADS_PER_NODE, Swarm

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=6)
NODES = st.integers(1, 6)


def run(swarm: Swarm, nodes: list[str]) -> Counter[str]:
    """Rounds in which each node takes one piece, until nothing moves; how many pieces each node gave."""
    given_by: Counter[str] = Counter()
    while True:
        pulls = [(node, pull) for node in nodes if (pull := swarm.take(node)) is not None]
        if not pulls:
            return given_by
        for node, pull in pulls:
            given_by[pull.holder] += 1
            if swarm.arrived(node, pull):
                swarm.has_file(node, swarm.chunks[pull.chunk].file)


@given(SIZES, st.integers(1, 20))
def test_pieces_cover_every_byte_once(sizes: list[int], chunk_bytes: int) -> None:
    swarm = Swarm(sizes, chunk_bytes)
    for file, size in enumerate(sizes):
        pieces = sorted((c.offset, c.length) for c in swarm.chunks if c.file == file)
        assert sum(length for _, length in pieces) == size
        assert all(a + length == b for (a, length), (b, _) in itertools.pairwise(pieces))


@given(SIZES, NODES, st.integers(0, 100))
def test_all_nodes_complete_and_take_each_piece_once(sizes: list[int], nodes: int, seed: int) -> None:
    swarm = Swarm(sizes, 10, seed)
    names = [f"n{i}" for i in range(nodes)]
    swarm.join("seed", range(len(sizes)))
    for name in names:
        swarm.join(name, [])
    given_by = run(swarm, names)
    assert all(swarm.is_complete(name) for name in names)
    assert sum(given_by.values()) == nodes * len(swarm.chunks)
    assert swarm.uncovered() == []


def test_receivers_give_on_what_they_have() -> None:
    swarm = Swarm([1000], 10, seed=0)
    swarm.join("seed", [0])
    for i in range(8):
        swarm.join(f"n{i}", [])
    given_by = run(swarm, [f"n{i}" for i in range(8)])
    assert given_by["seed"] < sum(given_by.values()) / 2


def test_a_node_gives_a_bounded_number_of_pieces_at_a_time() -> None:
    swarm = Swarm([1000], 10)
    swarm.join("seed", [0])
    swarm.join("n", [])
    pulls = [swarm.take("n") for _ in range(UPLOADS_PER_NODE)]
    assert all(pulls)
    assert swarm.take("n") is None
    swarm.arrived("n", pulls[0])  # type: ignore[arg-type]
    assert swarm.take("n") is not None


def test_what_nobody_has_is_for_the_source() -> None:
    swarm = Swarm([10, 10], 10)
    swarm.join("a", [0])
    swarm.join("b", [])
    assert swarm.uncovered() == [1]
    run(swarm, ["a", "b"])
    assert not swarm.is_complete("b")
    swarm.has_file("a", 1)
    run(swarm, ["a", "b"])
    assert swarm.is_complete("b")


def test_pieces_of_a_lost_node_are_had_from_those_that_got_them() -> None:
    swarm = Swarm([20], 10)
    swarm.join("seed", [0])
    swarm.join("a", [])
    for _ in range(2):
        pull = swarm.take("a")
        assert pull is not None
        swarm.arrived("a", pull)
    swarm.leave("seed")
    swarm.join("b", [])
    assert swarm.uncovered() == []
    assert run(swarm, ["b"]) == {"a": 2}


def test_a_file_that_came_altered_is_taken_from_checked_copies_only() -> None:
    swarm = Swarm([10], 10)
    swarm.join("seed", [0])
    for name in ("a", "b"):
        swarm.join(name, [])
        pull = swarm.take(name)
        assert pull is not None
        swarm.arrived(name, pull)
    swarm.lacks_file("a", 0)
    again = swarm.take("a")
    assert again is not None
    assert again.holder == "seed"
    swarm.failed("a", again, by_holder=False)
    swarm.leave("seed")
    assert swarm.take("a") is None
    assert swarm.uncovered() == [0]


def test_a_holder_that_cannot_give_is_not_asked_for_ever() -> None:
    swarm = Swarm([10], 10)
    swarm.join("liar", [0])
    swarm.join("n", [])
    for _ in range(STRIKES):
        pull = swarm.take("n")
        assert pull is not None
        swarm.failed("n", pull, by_holder=True)
    assert swarm.take("n") is None
    assert swarm.uncovered() == [0]


def test_an_answer_that_comes_after_its_node_left_changes_nothing() -> None:
    swarm = Swarm([10], 10)
    swarm.join("seed", [0])
    swarm.join("n", [])
    pull = swarm.take("n")
    assert pull is not None
    swarm.leave("n")
    assert swarm.arrived("n", pull) is False
    swarm.has_file("n", 0)
    assert swarm.members() == ["seed"]

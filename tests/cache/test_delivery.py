from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from serve_app.cache.delivery import ALTERED_LIMIT, Delivery, NodeLostError, Site
from serve_app.cache.manifest import Manifest, ModelFile
from serve_app.cache.node import Key
from serve_app.errors import CacheError, DiskFullError, IncompleteModelError, SourceAccessError, SourceNotFoundError

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4}


def manifest_of(source: str = "x/y") -> Manifest:
    return Manifest("m", source, "r", "rule", tuple(ModelFile(path, len(data)) for path, data in FILES.items()))


class DeadNodeError(Exception):
    """What Ray's errors are to a delivery: no CacheError."""


@dataclass
class Cluster:
    """Nodes in memory, and what was read from the source."""

    nodes: dict[str, Node] = field(default_factory=dict)
    reads: Counter[str] = field(default_factory=Counter)
    fail_source: Callable[[str], CacheError | None] = lambda node: None

    def add(self, *names: str) -> list[str]:
        for name in names:
            self.nodes[name] = Node(name, self)
        return list(names)

    def site(self, name: str) -> Site:
        return self.nodes[name]


@dataclass
class Node:
    name: str
    cluster: Cluster
    files: dict[int, bytearray] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    alive: bool = True
    published: bool = False
    gives: Callable[[bytes], bytes | None] = lambda data: data
    """What becomes of a piece that this node gives; None: it cannot."""
    source_opens: asyncio.Event | None = None
    source_lingers_s: float = 0.0
    """So long `fetch` goes on after the last file is here and checked."""
    begin_error: CacheError | None = None

    def _live(self) -> None:
        if not self.alive:
            raise DeadNodeError(self.name)

    async def begin(self, manifest: Manifest) -> list[int]:
        self._live()
        if self.begin_error is not None:
            raise self.begin_error
        return sorted(self.whole)

    async def fetch(self, key: Key, files: Sequence[int]) -> None:
        for index in files:
            if self.source_opens is not None:
                while not self.source_opens.is_set():
                    await asyncio.sleep(0.01)
                    self._live()
            self._live()
            error = self.cluster.fail_source(self.name)
            if error is not None:
                raise error
            path = list(FILES)[index]
            self.cluster.reads[path] += 1
            self.files[index] = bytearray(FILES[path])
            self.whole.add(index)
        await asyncio.sleep(self.source_lingers_s)

    async def checked(self, key: Key) -> list[int]:
        self._live()
        if self.published:
            raise IncompleteModelError("nothing was begun on this node")
        return sorted(self.whole)

    async def pull(self, key: Key, path: str, file: int, offset: int, length: int, holder: Site) -> bool:
        await asyncio.sleep(0)
        self._live()
        assert isinstance(holder, Node)
        if not holder.alive or file not in holder.files:
            return False
        data = holder.gives(bytes(holder.files[file][offset : offset + length]))
        if data is None:
            return False
        mine = self.files.setdefault(file, bytearray(len(FILES[path])))
        mine[offset : offset + length] = data
        return True

    async def verify(self, key: Key, file: int) -> bool:
        self._live()
        if bytes(self.files[file]) != list(FILES.values())[file]:
            del self.files[file]
            return False
        self.whole.add(file)
        return True

    async def finish(self, key: Key) -> str:
        self._live()
        assert {list(FILES)[i]: bytes(data) for i, data in self.files.items()} == FILES
        self.published = True
        return f"/{self.name}"

    async def abandon(self, key: Key) -> None:
        self._live()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def delivery_on(cluster: Cluster, source: str = "x/y") -> Delivery:
    return Delivery(manifest_of(source), cluster.site, chunk_bytes=100)


async def bring_all(delivery: Delivery, nodes: Sequence[str]) -> list[str | BaseException]:
    return await asyncio.wait_for(
        asyncio.gather(*(delivery.bring(node) for node in nodes), return_exceptions=True), timeout=30
    )


async def test_the_source_is_read_once_for_all_nodes(cluster: Cluster) -> None:
    nodes = cluster.add("a", "b", "c", "d")
    assert await bring_all(delivery_on(cluster), nodes) == ["/a", "/b", "/c", "/d"]
    assert cluster.reads == dict.fromkeys(FILES, 1)


async def test_a_reader_is_finished_only_when_its_reading_is(cluster: Cluster) -> None:
    """What it has checked is looked at meanwhile, and that cannot be answered any more once the model is published."""
    cluster.add("a", "b")
    cluster.nodes["a"].source_lingers_s = 0.6
    delivery = delivery_on(cluster)
    assert await bring_all(delivery, ["a", "b"]) == ["/a", "/b"]
    await asyncio.sleep(0.4)  # longer than from one look to the next
    assert delivery.failure is None


async def test_a_node_that_comes_later_is_served_by_its_peers(cluster: Cluster) -> None:
    delivery = delivery_on(cluster)
    await bring_all(delivery, cluster.add("a", "b"))
    cluster.reads.clear()
    assert await bring_all(delivery, cluster.add("late")) == ["/late"]
    assert cluster.reads == {}


async def test_files_a_node_has_already_are_not_read_again(cluster: Cluster) -> None:
    cluster.add("a", "b")
    cluster.nodes["b"].files[1] = bytearray(FILES["model.safetensors"])
    cluster.nodes["b"].whole.add(1)
    await bring_all(delivery_on(cluster), ["a", "b"])
    assert cluster.reads == {"config.json": 1}


async def test_where_the_reading_node_dies_another_reads_on(cluster: Cluster) -> None:
    cluster.add("a", "b", "c")
    cluster.nodes["a"].source_opens = asyncio.Event()
    bringing = asyncio.create_task(bring_all(delivery_on(cluster), ["a", "b", "c"]))
    await asyncio.sleep(0.1)
    cluster.nodes["a"].alive = False
    dead, *paths = await bringing
    assert isinstance(dead, DeadNodeError)
    assert paths == ["/b", "/c"]


async def test_where_a_giving_node_dies_others_take_over(cluster: Cluster) -> None:
    cluster.add("a", "b", "c")
    delivery = delivery_on(cluster)
    await bring_all(delivery, ["a"])
    pieces = 0

    def give_some(data: bytes) -> bytes | None:
        nonlocal pieces
        pieces += 1
        return data if pieces < 5 else None

    cluster.nodes["a"].gives = give_some
    assert await bring_all(delivery, ["b", "c"]) == ["/b", "/c"]
    assert cluster.reads["model.safetensors"] == 2


async def test_an_altered_piece_is_found_and_taken_again_from_a_checked_copy(cluster: Cluster) -> None:
    cluster.add("a", "b")
    delivery = delivery_on(cluster)
    await bring_all(delivery, ["a"])
    flips = 1

    def flip_once(data: bytes) -> bytes:
        nonlocal flips
        flips -= 1
        return data if flips < 0 else bytes([data[0] ^ 1]) + data[1:]

    cluster.nodes["a"].gives = flip_once
    assert await bring_all(delivery, ["b"]) == ["/b"]


async def test_a_file_that_always_comes_altered_is_an_error(cluster: Cluster) -> None:
    cluster.add("a", "b")
    delivery = delivery_on(cluster)
    await bring_all(delivery, ["a"])
    cluster.nodes["a"].gives = lambda data: bytes(len(data))
    (failed,) = await bring_all(delivery, ["b"])
    assert isinstance(failed, IncompleteModelError)
    assert f"altered {ALTERED_LIMIT} times" in failed.message


async def test_an_error_of_the_source_reaches_every_node_at_once(cluster: Cluster) -> None:
    cluster.fail_source = lambda node: SourceAccessError("no")
    delivery = delivery_on(cluster)
    results = await bring_all(delivery, cluster.add("a", "b", "c"))
    assert [type(result) for result in results] == [SourceAccessError] * 3
    assert delivery.failure is not None


async def test_a_directory_may_be_on_one_node_only(cluster: Cluster) -> None:
    cluster.fail_source = lambda node: None if node == "c" else SourceNotFoundError(f"not on {node}")
    nodes = cluster.add("a", "b", "c")
    assert await bring_all(delivery_on(cluster, "/folder"), nodes) == ["/a", "/b", "/c"]
    assert cluster.reads == dict.fromkeys(FILES, 1)


async def test_a_directory_is_waited_for_until_the_node_that_has_it_comes(cluster: Cluster) -> None:
    cluster.fail_source = lambda node: None if node == "c" else SourceNotFoundError(f"not on {node}")
    cluster.add("a", "c")
    delivery = delivery_on(cluster, "/folder")
    delivery.expect("c")
    bringing = asyncio.create_task(bring_all(delivery, ["a"]))
    await asyncio.sleep(0.3)
    assert not bringing.done()
    assert await bring_all(delivery, ["c"]) == ["/c"]
    assert await bringing == ["/a"]


@pytest.mark.parametrize("how", ["lost", "full"])
async def test_a_directory_whose_only_node_does_not_come_is_an_error(cluster: Cluster, how: str) -> None:
    cluster.fail_source = lambda node: SourceNotFoundError(f"not on {node}")
    cluster.add("a", "c")
    delivery = delivery_on(cluster, "/folder")
    delivery.expect("c")
    bringing = asyncio.create_task(bring_all(delivery, ["a"]))
    await asyncio.sleep(0.3)
    if how == "lost":
        delivery.lost("c")
    else:
        cluster.nodes["c"].begin_error = DiskFullError("full")
        await bring_all(delivery, ["c"])
    [error] = await bringing
    assert isinstance(error, SourceNotFoundError)


async def test_a_directory_that_no_node_has_is_an_error(cluster: Cluster) -> None:
    cluster.fail_source = lambda node: SourceNotFoundError(f"not on {node}")
    results = await bring_all(delivery_on(cluster, "/folder"), cluster.add("a", "b"))
    assert {type(result) for result in results} == {SourceNotFoundError}


async def test_a_full_disk_stops_its_own_node_only(cluster: Cluster) -> None:
    cluster.fail_source = lambda node: DiskFullError("full") if node == "a" else None
    full, *paths = await bring_all(delivery_on(cluster), cluster.add("a", "b", "c"))
    assert isinstance(full, DiskFullError)
    assert paths == ["/b", "/c"]


async def test_a_node_that_fails_can_be_brought_to_again(cluster: Cluster) -> None:
    cluster.add("a", "b")
    cluster.nodes["b"].begin_error = DiskFullError("full")
    delivery = delivery_on(cluster)
    _, failed = await bring_all(delivery, ["a", "b"])
    assert isinstance(failed, DiskFullError)
    cluster.nodes["b"].begin_error = None
    assert await bring_all(delivery, ["b"]) == ["/b"]


async def test_a_node_reported_lost_is_not_waited_for(cluster: Cluster) -> None:
    cluster.add("a", "b")
    cluster.nodes["a"].source_opens = asyncio.Event()
    delivery = delivery_on(cluster)
    bringing = asyncio.create_task(bring_all(delivery, ["a", "b"]))
    await asyncio.sleep(0.1)
    delivery.lost("b")
    await asyncio.sleep(1.2)
    cluster.nodes["a"].source_opens.set()
    path, lost = await bringing
    assert path == "/a"
    assert isinstance(lost, NodeLostError)

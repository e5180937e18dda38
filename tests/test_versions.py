"""What makes a version, and when a replica of a new one may take the place of an old one."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import versions
from serve_app.config import ModelConfig
from serve_app.errors import VersionGoneError
from serve_app.types import TokenBatch, Version
from serve_app.versions import LOST_AFTER_S, PRESENT_S, Member, TierName, VersionBarrier, version_of
from tests.ingress.test_coalescer import settle
from tests.ingress.test_keys import Clock
from tests.test_types import batch

MODEL = ModelConfig(name="tiny", source="./tiny")
PROBE = batch([[2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's files; the name is that of a revision."""
    folder = tmp_path / ("0" * 40)
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_text(f"of {name}")
    return folder


def fingerprint(folder: Path, is_pinned: bool = False, **keys: Any) -> str:
    return version_of(folder, MODEL.model_copy(update=keys), is_pinned=is_pinned).fingerprint


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_version_is_the_same_for_every_replica_of_the_same_model(
    folder: Path, tmp_path: Path, is_pinned: bool
) -> None:
    on_another_node = tmp_path / "node" / folder.name
    shutil.copytree(folder, on_another_node)
    assert version_of(folder, MODEL, is_pinned=is_pinned) == version_of(on_another_node, MODEL, is_pinned=is_pinned)


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("change", [{"pooling": "cls"}, {"max_input_tokens": 64}, {"dtype": "bfloat16"}], ids=str)
def test_a_version_changes_with_the_models_configuration(folder: Path, is_pinned: bool, change: dict[str, Any]) -> None:
    assert fingerprint(folder, is_pinned, **change) != fingerprint(folder, is_pinned)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "1_Pooling/config.json"])
def test_without_a_commit_a_version_changes_with_the_content_of_a_file(folder: Path, name: str) -> None:
    before = version_of(folder, MODEL, is_pinned=False)
    (folder / name).write_text((folder / name).read_text().upper())
    after = version_of(folder, MODEL, is_pinned=False)
    assert before.fingerprint != after.fingerprint
    assert before.revision != after.revision


def rename(folder: Path) -> None:
    (folder / "config.json").rename(folder / "other.json")


def add(folder: Path) -> None:
    (folder / "added_tokens.json").write_text("")


def resize(folder: Path) -> None:
    (folder / "model.safetensors").write_text("more")


@pytest.mark.parametrize("change", [rename, add, resize])
def test_without_a_commit_a_version_changes_with_the_names_and_sizes_of_all_files(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_a_pinned_version_changes_with_the_folders_name_and_reads_no_file(folder: Path) -> None:
    before = version_of(folder, MODEL, is_pinned=True)
    assert before.revision == folder.name
    (folder / "tokenizer.json").write_text("touched")
    assert version_of(folder, MODEL, is_pinned=True) == before
    renamed = folder.rename(folder.with_name("1" * 40))
    after = version_of(renamed, MODEL, is_pinned=True)
    assert after.revision == "1" * 40
    assert after.fingerprint != before.fingerprint


def test_a_version_changes_with_the_software(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(folder, is_pinned=True)
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: "99.0")
    assert fingerprint(folder, is_pinned=True) != before


def test_a_replica_refuses_what_is_meant_for_another_version() -> None:
    version = Version("mine", "revision")
    version.check("mine")
    for other in ("another", ""):
        with pytest.raises(VersionGoneError, match="mine"):
            version.check(other)


def member(tier: TierName, version: str, replica: str = "1", model: str = "tiny") -> Member:
    return Member(model, tier, version, f"{model}-{tier}-{version}-{replica}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def barrier(clock: Clock) -> VersionBarrier:
    """One that has been there for long enough to know all."""
    barrier = VersionBarrier(clock)
    clock.now += PRESENT_S + 1
    return barrier


async def stays(task: asyncio.Task[Any], barrier: VersionBarrier) -> bool:
    """Whether it still waits, after it has been made to look again."""
    barrier.present(member("model", "any", str(next(_numbers)), model="elsewhere"))
    await settle()
    return not task.done()


_numbers = itertools.count()


def entering(barrier: VersionBarrier, one: Member, probe: TokenBatch | None = None) -> asyncio.Task[None]:
    return asyncio.create_task(barrier.enter(one, probe))


@pytest.mark.parametrize(("mine", "other"), [("tokenizer", "model"), ("model", "tokenizer")])
async def test_a_replica_of_a_new_version_waits_for_the_other_tier_while_an_old_version_is_there(
    barrier: VersionBarrier, mine: TierName, other: TierName
) -> None:
    for old in (member("tokenizer", "old"), member("model", "old")):
        barrier.present(old)
    first = entering(barrier, member(mine, "new"))
    second = entering(barrier, member(mine, "new", "2"))
    assert await stays(first, barrier)
    assert await stays(second, barrier), "another one of the same tier is no help"
    third = entering(barrier, member(other, "new"))
    await asyncio.wait_for(asyncio.gather(first, second, third), 5)


async def test_a_first_replica_enters_when_nobody_else_has_been_heard_of_for_long_enough(clock: Clock) -> None:
    barrier = VersionBarrier(clock)
    first = entering(barrier, member("tokenizer", "new"))
    assert await stays(first, barrier)
    clock.now += PRESENT_S - 0.1
    assert await stays(first, barrier)
    clock.now += 0.2
    assert not await stays(first, barrier)


async def test_a_barrier_that_starts_anew_does_not_take_silence_for_absence(clock: Clock) -> None:
    barrier = VersionBarrier(clock)
    new = entering(barrier, member("model", "new"))
    clock.now += PRESENT_S / 2
    barrier.present(member("model", "old"))  # which says so again, as every replica does
    clock.now += PRESENT_S
    assert await stays(new, barrier)
    new.cancel()


async def test_a_replica_enters_at_once_where_the_other_tier_of_its_version_is_there(clock: Clock) -> None:
    barrier = VersionBarrier(clock)
    barrier.present(member("model", "old"))
    barrier.present(member("tokenizer", "same"))
    await asyncio.wait_for(barrier.enter(member("model", "same")), 5)


async def test_a_replica_that_ends_in_the_moment_in_which_another_comes_has_ended(barrier: VersionBarrier) -> None:
    """`asyncio.wait_for` loses such a cancellation up to Python 3.11."""
    for turns in range(6):
        waits = asyncio.create_task(barrier.probe(f"model {turns}", "new"))
        await settle()
        barrier.present(Member("another", "model", "old", f"replica {turns}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        waits.cancel()
        await asyncio.wait((waits,), timeout=5)
        assert waits.cancelled(), turns


async def test_a_silent_replica_stops_counting(barrier: VersionBarrier, clock: Clock) -> None:
    barrier.present(member("model", "old"))
    clock.now += LOST_AFTER_S - 1
    new = entering(barrier, member("model", "new"))
    assert await stays(new, barrier)
    clock.now += 2
    await asyncio.wait_for(new, 5)  # of itself: nobody comes


async def test_a_replica_that_goes_on_telling_counts_for_ever(barrier: VersionBarrier, clock: Clock) -> None:
    old = member("model", "old")
    barrier.present(old)
    new = entering(barrier, member("model", "new"))
    for _ in range(10):
        clock.now += PRESENT_S
        barrier.present(old)
    assert await stays(new, barrier)
    new.cancel()


async def test_a_half_that_has_fallen_silent_is_no_help(barrier: VersionBarrier, clock: Clock) -> None:
    barrier.present(member("tokenizer", "new"))
    clock.now += LOST_AFTER_S + 1
    barrier.present(member("model", "old"))
    new = entering(barrier, member("model", "new"))
    assert await stays(new, barrier)
    new.cancel()


async def test_models_do_not_wait_for_each_other(barrier: VersionBarrier) -> None:
    barrier.present(member("model", "old", model="another"))
    barrier.present(member("tokenizer", "new", model="another"))
    await asyncio.wait_for(barrier.enter(member("model", "new")), 5)


async def test_a_probe_is_what_a_tokenizer_of_that_version_brings_and_is_waited_for(
    barrier: VersionBarrier, clock: Clock
) -> None:
    probe = asyncio.create_task(barrier.probe("tiny", "new"))
    barrier.present(member("tokenizer", "old"), batch([[9]]))
    barrier.present(member("tokenizer", "new", model="another"), batch([[9]]))
    barrier.present(member("model", "new"))
    assert await stays(probe, barrier)
    tokenizer = entering(barrier, member("tokenizer", "new"), PROBE)
    assert await asyncio.wait_for(probe, 5) is PROBE
    await asyncio.wait_for(tokenizer, 5)
    clock.now += LOST_AFTER_S + 1
    late = asyncio.create_task(barrier.probe("tiny", "new"))
    assert await stays(late, barrier), "that of a tokenizer that is gone is no help: it may have been the last"
    late.cancel()


MEMBERS = [member(tier, version, replica) for tier in ("tokenizer", "model") for version in "ab" for replica in "12"]
events = st.lists(
    st.tuples(st.sampled_from(("comes", "goes")), st.sampled_from(MEMBERS))
    | st.tuples(st.just("waits"), st.integers(0, 15)),
    max_size=40,
)


@given(events)
def test_whoever_comes_and_goes_no_replica_of_a_new_version_enters_alone_beside_an_old_one(
    events: list[tuple[str, Any]],
) -> None:
    """Members that live tell so every second; `enter` asks nothing but `may_enter`."""
    clock = Clock()
    barrier, started = VersionBarrier(clock), clock.now
    alive: set[Member] = set()
    heard: dict[Member, float] = {}

    def tell() -> None:
        for one in sorted(alive, key=lambda one: one.replica):
            barrier.present(one)
            heard[one] = clock.now

    for what, value in events:
        if what == "waits":
            for _ in range(value):
                clock.now += 1
                tell()
        elif what == "goes":
            alive.discard(value)
        else:
            alive.add(value)
        tell()
        known = {one for one, at in heard.items() if clock.now - at <= LOST_AFTER_S}
        assert alive <= known
        for one in alive:
            has_other_half = any(x.fingerprint == one.fingerprint and x.tier != one.tier for x in known)
            if alive_of_another_version(one, alive) and not has_other_half:
                assert not barrier.may_enter(one)
            if has_other_half:
                assert barrier.may_enter(one)
            if clock.now - started > PRESENT_S and not alive_of_another_version(one, known):
                assert barrier.may_enter(one), "nothing holds it"


def alive_of_another_version(one: Member, among: set[Member]) -> bool:
    return any(other.fingerprint != one.fingerprint for other in among)

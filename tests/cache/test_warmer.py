"""What the warmer knows of gates. How it warms nodes is tested on several of them, in tests/cluster."""

from __future__ import annotations

from serve_app.cache.warmer import Warmer
from serve_app.config import CacheConfig


async def test_a_gate_may_end_unless_serve_has_made_it_again() -> None:
    warmer = Warmer(CacheConfig())
    assert await warmer.pass_gate("a#a-model", "1")
    assert not await warmer.pass_gate("a#a-model", "1")
    assert await warmer.pass_gate("b#b-model", "1")
    assert await warmer.pass_gate("a#a-model", "2")
    assert not await warmer.pass_gate("a#a-model", "2")

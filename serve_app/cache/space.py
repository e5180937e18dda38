"""Room for a model: the free-space check, and removal of copies used longest ago."""

from __future__ import annotations

import logging
from collections.abc import Set

from serve_app.cache.disk import free_bytes
from serve_app.cache.store import Store
from serve_app.config import CacheConfig
from serve_app.errors import DiskFullError

logger = logging.getLogger(__name__)


def make_room(store: Store, cache: CacheConfig, kept: Set[tuple[str, str]], what: str, needed: int) -> None:
    """Remove copies that are not among `kept` (name, revision) until `needed` bytes fit.

    They fit if `cache.min_free_bytes` stay free beside them, and all copies together stay within `cache.max_bytes`.
    Raises DiskFullError, which says how much is missing, if they do not fit even then; nothing is removed in vain.
    """
    short = _short_by(store, cache, needed)
    if short <= 0:
        return
    removable = [copy for copy in store.copies() if (copy.name, copy.revision) not in kept]
    if sum(copy.bytes for copy in removable) < short:
        raise DiskFullError(_refusal(store, cache, what, needed, short))
    for copy in removable:
        if short <= 0:
            break
        logger.info("removing %s %s (%d bytes, used longest ago) for %s", copy.name, copy.revision, copy.bytes, what)
        store.remove(copy.name, copy.revision)
        short -= copy.bytes
    if (short := _short_by(store, cache, needed)) > 0:
        raise DiskFullError(_refusal(store, cache, what, needed, short))


def _short_by(store: Store, cache: CacheConfig, needed: int) -> int:
    """Bytes that must go before `needed` more fit; zero or less if they do."""
    on_disk = needed + cache.min_free_bytes - free_bytes(store.root)
    if cache.max_bytes is None:
        return on_disk
    used = sum(copy.bytes for copy in store.copies()) + store.staged_bytes()
    return max(on_disk, used + needed - cache.max_bytes)


def _refusal(store: Store, cache: CacheConfig, what: str, needed: int, short: int) -> str:
    bound = "" if cache.max_bytes is None else f", cache.max_bytes is {cache.max_bytes}"
    return (
        f"{what} needs {needed} more bytes below {store.root}, where {free_bytes(store.root)} are free and "
        f"{cache.min_free_bytes} must stay free (cache.min_free_bytes){bound}: {short} bytes short, and no copy "
        "that is not in use is left to remove. Make space, or choose another cache.root"
    )

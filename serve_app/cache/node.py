"""Warming the node that this process runs on."""

from __future__ import annotations

from pathlib import Path

from serve_app.cache.fetch import fetch
from serve_app.cache.hub import Hub
from serve_app.cache.resolve import resolve
from serve_app.cache.store import Store, expand
from serve_app.config import CacheConfig, ModelConfig


def warm_this_node(model: ModelConfig, cache: CacheConfig) -> Path:
    """The folder with the complete model on this node, fetched now if it is not there yet.

    Idempotent, and safe to call from several processes at once. A pinned commit that is complete costs no request.
    Raises CacheError.
    """
    store = Store(expand(cache.root))
    if model.revision is not None and store.is_ready(model.name, model.revision):
        return store.path(model.name, model.revision)
    hub = Hub(cache.download_timeout_s)
    resolved = resolve(model, hub)
    manifest = resolved.manifest
    if store.is_ready(manifest.name, manifest.revision):
        return store.path(manifest.name, manifest.revision)
    with store.staging(manifest.name, manifest.revision) as folder:
        return store.publish(folder, fetch(resolved, folder, hub))

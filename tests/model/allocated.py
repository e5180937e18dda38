"""How much memory tensors take while code runs on the CPU, counted as a device's allocator would."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serve_app.model.memory import DeviceMemory, from_stats


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is entered, until the last reference to it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {self._storage(each)._cdata for each in tree_leaves((args, kwargs)) if self._counts(each)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if self._counts(each) and self._storage(each)._cdata not in known:
                self._add(self._storage(each))
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)

    @staticmethod
    def _counts(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and not value.is_mkldnn

    @staticmethod
    def _storage(tensor: torch.Tensor) -> Any:
        return tensor.untyped_storage()

    def reset_peak(self) -> None:
        self.peak = self.bytes

    def read(self) -> DeviceMemory:
        stats = {"allocated_bytes.all.current": self.bytes, "allocated_bytes.all.peak": self.peak}
        return from_stats(stats, 1 << 40, 1 << 40)

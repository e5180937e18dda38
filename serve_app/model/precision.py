"""In which types a model's weights are kept and its products are computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.model.host import fast_bfloat16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """`weights` as loaded; `autocast` is the type of matrix products where it is another one.

    `int8` means that projections have 8-bit weights and inputs (CPU), everything else float32.
    """

    weights: torch.dtype
    autocast: torch.dtype | None = None
    int8: bool = False

    @property
    def label(self) -> str:
        """As written in `/info`: "float32", "int8", "float32, products in bfloat16"."""
        if self.int8:
            return "int8"
        products = "" if self.autocast is None else f", products in {_name(self.autocast)}"
        return _name(self.weights) + products

    @property
    def tolerance(self) -> float:
        """What rounding in another order may change, relative to the largest hidden state."""
        if self.int8:
            return 6e-2
        return {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[self.autocast or self.weights]

    @contextmanager
    def computing(self, device: torch.device) -> Iterator[None]:
        """Everything that is computed with the model is computed inside this block."""
        products = self.autocast or torch.bfloat16
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=products, enabled=self.autocast is not None),
        ):
            yield


def pick_precision(config: ModelConfig, device: torch.device) -> Precision:
    """The configured precision; `auto` is bfloat16 on CUDA and float32 on CPU.

    Raises ConfigError for int8 on a GPU and for autocast on CPU. bfloat16 on a CPU that emulates it (several times
    slower) becomes float32, with a warning.
    """
    where = f"models.{config.name}.dtype"
    autocast: torch.dtype | None = None if config.autocast is None else getattr(torch, config.autocast)
    if autocast is not None and device.type == "cpu":
        raise ConfigError(f"models.{config.name}.autocast: is for GPUs; on CPU set dtype to bfloat16, which is faster")
    if config.dtype == "int8":
        if device.type != "cpu":
            raise ConfigError(f"{where}: int8 is for CPU; use bfloat16 on a GPU")
        return Precision(torch.float32, int8=True)
    weights = _pick_weights(config, device)
    if device.type == "cpu" and weights is torch.bfloat16 and not fast_bfloat16():
        log.warning("%s: this CPU has no bfloat16 instructions and would emulate them; float32 is used", where)
        return Precision(torch.float32)
    return Precision(weights, None if autocast == weights else autocast)


def _pick_weights(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and config.autocast is None else torch.float32
    weights: torch.dtype = getattr(torch, config.dtype)
    return weights


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

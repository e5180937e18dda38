"""Faster projections on CPU: oneDNN with weights laid out once, the activation computed on the way out.

torch sends float32 `nn.Linear` to MKL, which on CPUs of other makers than Intel stays at AVX2; oneDNN uses what the
CPU has. Which is faster is measured here, once at load. The arithmetic is the same, in float32 to rounding.

oneDNN compiles a kernel for each number of rows that it meets, of up to 3 MB: gigabytes, were they kept for all numbers
of tokens that batches have. So rows are padded up to a few dozen numbers, see `padded_rows`, and a replica keeps the
kernels used last, see `serve_app.model.memory.bound_kernel_cache`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import activations

_PROBE_TOKENS = 256
_WORTHWHILE = 1.1


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation in oneDNN's terms, see `fusion_unary_attr_map` in ATen/native/mkldnn/Linear.cpp."""

    name: str = "none"
    algorithm: str = ""


class OneDnnLinear(nn.Module):  # type: ignore[misc]
    """`activation(x @ weight.T + bias)`; the weight is kept in oneDNN's own layout only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, activation: Activation) -> None:
        super().__init__()
        # Not registered as buffers: the opaque layout can be neither moved nor saved.
        object.__setattr__(self, "weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()))
        object.__setattr__(self, "bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        filler = padded_rows(rows) - rows
        flat = x.reshape(rows, self.in_features)
        y = self._project(pad(flat, (0, 0, 0, filler)) if filler else flat)
        return y[:rows].view(*x.shape[:-1], self.out_features)

    def _project(self, flat: Tensor) -> Tensor:
        name, algorithm = self.activation.name, self.activation.algorithm
        y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, name, [], algorithm)
        return y


def padded_rows(rows: int) -> int:
    """The next of the numbers of rows that are computed: at most 7 more below 64, about 3 % more beyond."""
    step = 8 if rows <= 64 else 1 << max(4, (rows - 1).bit_length() - 5)
    return -(-rows // step) * step


@dataclass(frozen=True, slots=True)
class Swap:
    """One module of a model and what stands in for it."""

    parent: nn.Module
    name: str
    original: nn.Module
    replacement: nn.Module

    def apply(self) -> None:
        setattr(self.parent, self.name, self.replacement)

    def undo(self) -> None:
        setattr(self.parent, self.name, self.original)


def pays(module: nn.Module) -> bool:
    """Whether oneDNN is clearly faster than what torch would use, for this model's most expensive projection."""
    linears = [part for part in module.modules() if type(part) is nn.Linear]
    if not linears or not torch.backends.mkldnn.is_available() or linears[0].weight.device.type != "cpu":
        return False
    if linears[0].weight.dtype is not torch.float32:
        return _has_half(linears[0].weight.dtype)
    linear = max(linears, key=lambda part: part.weight.numel())
    x = torch.randn(_PROBE_TOKENS, linear.in_features)
    candidate = OneDnnLinear(linear, Activation())
    return _seconds(lambda: linear(x)) > _WORTHWHILE * _seconds(lambda: candidate(x))


def _has_half(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this half precision here; then torch uses it, too, but without bounding shapes."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())


def _seconds(call: Callable[[], Tensor], repeats: int = 5) -> float:
    """CPU time of the calling thread, the least of some runs: what else the machine does can only add to it."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best


def plan_swaps(module: nn.Module, probe: Callable[[], object]) -> list[Swap]:
    """What to exchange in `module`; `probe` runs it once on some input, to see which activation follows what."""
    with _watch(module) as followers:
        probe()
    fused = {id(linear): activation for linear, activation in followers.values() if linear is not None}
    swaps = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                activation = describe(fused[id(child)]) if id(child) in fused else None
                swaps.append(Swap(parent, name, child, OneDnnLinear(child, activation or Activation())))
            elif id(child) in followers and followers[id(child)][0] is not None:
                swaps.append(Swap(parent, name, child, nn.Identity()))
    return swaps


def describe(activation: nn.Module) -> Activation | None:
    """What a module computes in the terms of oneDNN, or None where it has no word for exactly that."""
    function = getattr(activation, "act", None)
    if isinstance(activation, activations.GELUActivation) and function is nn.functional.gelu:
        return Activation("gelu", "none")
    tanh = isinstance(function, functools.partial) and function.keywords == {"approximate": "tanh"}
    if isinstance(activation, activations.NewGELUActivation) or (
        isinstance(activation, activations.GELUTanh) and (tanh or function == activation._gelu_tanh_python)
    ):
        return Activation("gelu", "tanh")
    if isinstance(activation, activations.SiLUActivation | nn.SiLU):
        return Activation("swish")
    return Activation("relu") if isinstance(activation, nn.ReLU) else None


@contextmanager
def _watch(module: nn.Module) -> Iterator[dict[int, tuple[nn.Linear | None, nn.Module]]]:
    """Collects, by id of the activation, the one projection whose output it is called with; None where they vary."""
    followers: dict[int, tuple[nn.Linear | None, nn.Module]] = {}
    last: list[Any] = [None, None]

    def after_linear(linear: nn.Linear, _: Any, output: Tensor) -> None:
        last[:] = [linear, output]

    def before_activation(activation: nn.Module, args: tuple[Any, ...]) -> None:
        linear = last[0] if args and args[0] is last[1] else None
        known = followers.get(id(activation), (linear, activation))[0]
        followers[id(activation)] = (linear if known is linear else None, activation)

    hooks = []
    for part in module.modules():
        if type(part) is nn.Linear:
            hooks.append(part.register_forward_hook(after_linear))
        elif describe(part) is not None:
            hooks.append(part.register_forward_pre_hook(before_activation))
    try:
        yield followers
    finally:
        for hook in hooks:
            hook.remove()

"""Projections with 8-bit weights and 8-bit inputs, on CPU.

Weights have one scale for each output, inputs one for each token: what a token becomes never depends on its neighbours
in the batch, as it would with one scale for the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from serve_app.model.linear import Swap, padded_rows

_LARGEST = 127


class Int8Linear(nn.Module):  # type: ignore[misc]
    """`x @ weight.T + bias`, with both factors rounded to 8 bits and products summed in 32."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scales = quantize(linear.weight.detach().float())
        self.register_buffer("weight", weight.T.contiguous())
        self.register_buffer("scales", scales.T.contiguous())
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        filler = padded_rows(rows) - rows
        flat = x.reshape(rows, self.in_features)
        values, scales = quantize(pad(flat, (0, 0, 0, filler)) if filler else flat)
        sums = torch._int_mm(values, self.weight) * scales
        y = torch.addcmul(self.bias, sums, self.scales)
        return y[:rows].view(*x.shape[:-1], self.out_features)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in 8 bits with a scale of its own: values (n, k) int8 and scales (n, 1) with rows ≈ values * scales."""
    scales = rows.abs().amax(dim=1, keepdim=True).div_(_LARGEST).clamp_min_(1e-12)
    return (rows / scales).round_().to(torch.int8), scales


def plan_swaps(module: nn.Module) -> list[Swap]:
    """Every projection of `module`, to be exchanged."""
    return [
        Swap(parent, name, child, Int8Linear(child))
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]

"""A linear layer whose weight is packed k-bit codes: frozen, dequantised for every product and never kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora_cli.quant.packed import PackedLayer, Storage


class PackedLinear(PackedLayer, nn.Linear):
    """`nn.Linear` with a packed, frozen weight; a gradient flows to its input, and to an adapter around it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: Storage, **factory: Any) -> None:
        """factory: device, and dtype of the bias."""
        super().__init__(in_features, out_features, bias, device="meta")
        device, dtype = factory.get("device"), factory.get("dtype") or torch.get_default_dtype()
        self.reserve(storage, device)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out) in the type that autocast multiplies in, else in x's own."""
        return frozen_product(x, self.weight, self.bias, self.dequantized)


def frozen_product(x: Tensor, stored: Tensor, bias: Tensor | None, dequantized: Callable[..., Tensor]) -> Tensor:
    """x @ W.T + bias in the type that autocast multiplies in, else in x's; W is never kept for backward.

    stored: a tensor that W is read from; dequantized: gives W (out, in) in a type, the same at every call.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    product: Tensor = _Product.apply(x, stored, None if bias is None else bias.to(x.dtype), dequantized)
    return product


class _Product(torch.autograd.Function):
    """x @ W.T + bias for a frozen W, which is dequantised again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dequantized: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(weight)  # through autograd, so that recomputation sees it
        ctx.dequantized = dequantized
        return F.linear(x, dequantized(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        bias = grad_output.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return grad_output @ ctx.dequantized(grad_output.dtype), None, bias, None

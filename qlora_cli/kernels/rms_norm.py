"""RMSNorm by a frozen weight as one step of autograd (Zhang and Sennrich 2019), in the orders of casts that models use.

A model's own norm keeps a copy of its input in fp32 for backward. Here the input itself is kept, in its own type, and
one fp32 number a row. Forward gives the bits of the model's own code: the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Order(NamedTuple):
    """Where a model multiplies by its weight, before or after the cast to its input's type.

    apply: (normalised in fp32, weight, the input's dtype) to the output. back: (the output's gradient, weight, fp32) to
    the gradient of what was normalised, in any type.
    """

    apply: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    back: Callable[[Tensor, Tensor, torch.dtype], Tensor]


ORDERS: dict[str, Order] = {
    "llama": Order(
        lambda normed, weight, dtype: weight * normed.to(dtype),
        lambda grad, weight, wide: grad * weight,
    ),
    "olmo": Order(
        lambda normed, weight, dtype: (weight * normed).to(dtype),
        lambda grad, weight, wide: grad.to(wide) * weight,
    ),
    "gemma": Order(
        lambda normed, weight, dtype: (normed * (1.0 + weight.to(normed.dtype))).to(dtype),
        lambda grad, weight, wide: grad.to(wide) * (1.0 + weight.to(wide)),
    ),
}
"""Models to theirs: llama rounds before the product, olmo and gemma after it, gemma's weight is what is beside 1."""


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, order: str = "llama") -> Tensor:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ORDERS[order].apply(normed, weight, x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, order: str = "llama") -> Tensor:
    """x (..., d) times weight (d,) over the root of the mean square of each row; the gradient goes to x alone.

    Returns (..., d): in x's type, by the order of llama in the wider one of x's and the weight's.
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps, ORDERS[order])
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, order: Order) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.order = order
        return order.apply(wide * rstd, weight, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        by_normed = ctx.order.back(grad, weight, rstd.dtype).to(rstd.dtype)
        wide = x.to(rstd.dtype)
        along = (by_normed * wide).sum(-1, keepdim=True)
        by_x = (by_normed * rstd).addcmul_(wide, along * rstd.pow(3) / -x.shape[-1])
        return by_x.to(x.dtype), None, None, None

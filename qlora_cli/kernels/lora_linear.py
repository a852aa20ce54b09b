"""A frozen linear layer and its LoRA adapter as one step of autograd (LoRA: Hu et al. 2021; QLoRA: equation 5).

y = x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T. PEFT computes this in eight operations, each with a tensor of the
size of y or x, most of them kept for backward. Here the adapter's product is added into the base's, and kept are x,
which other layers mostly keep too, and what is r wide; W is dequantised again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LANES = 4
"""Random numbers of 16 bits in one of 64."""


class FrozenWeight(NamedTuple):
    """A base layer's weight (out, in) and bias (out,), neither of them trained.

    stored: what W is read from, seen by autograd, so that a change before backward is an error. read: W in a dtype.
    """

    stored: Tensor
    read: Callable[[torch.dtype], Tensor]
    bias: Tensor | None


def reference_lora_linear(
    x: Tensor, base: FrozenWeight, a: Tensor, b: Tensor, scaling: float, keep: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """The same in plain torch; keep (N, in) bool: which elements of x dropout leaves, each over 1 - p."""
    dropped = x if keep is None else x * keep.view(x.shape) / (1 - p)
    return F.linear(x, base.read(x.dtype), base.bias) + F.linear(F.linear(dropped, a), b) * scaling


def lora_linear(x: Tensor, base: FrozenWeight, a: Tensor, b: Tensor, scaling: float, p: float = 0.0) -> Tensor:
    """x (..., in) to (..., out), all in x's dtype; gradients go to x, a (r, in) and b (out, r).

    p: the probability with which dropout hides an element of x from the adapter, drawn anew in every call.
    """
    keep, kept_share = (None, 1.0) if p == 0 else keep_mask(x.shape[:-1].numel(), x.shape[-1], p, x.device)
    bias = None if base.bias is None else base.bias.to(x.dtype)
    y: Tensor = _LoraLinear.apply(x, base.stored, bias, a, b, base.read, scaling, keep, kept_share)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stored: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        read: Callable[[torch.dtype], Tensor],
        scaling: float,
        keep: Tensor | None,
        kept_share: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, read(x.dtype), bias)
        dropped = rows if keep is None else rows * keep
        low = (dropped @ a.T).mul_(scaling / kept_share)  # (N, r)
        y.addmm_(low, b.T)
        ctx.save_for_backward(rows, stored, a, b, low, keep)
        ctx.read, ctx.factor = read, scaling / kept_share
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, _, a, b, low, keep = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        grad_b = grad.T @ low if ctx.needs_input_grad[4] else None
        grad_low = (grad @ b).mul_(ctx.factor)
        grad_a = None
        if ctx.needs_input_grad[3]:
            grad_a = grad_low.T @ (rows if keep is None else rows * keep)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.read(grad.dtype)
            if keep is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.addcmul_(grad_low @ a, keep)
            grad_x = grad_x.view(*shape[:-1], grad_x.shape[-1])
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


def keep_mask(rows: int, columns: int, p: float, device: torch.device) -> tuple[Tensor, float]:
    """(rows, columns) bool, False with probability p up to 2^-16, and the exact probability of True.

    Four elements are decided by one random number of 64 bits, which takes a fraction of `bernoulli_`'s time.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    numbers = torch.empty(-(-rows * columns // LANES), dtype=torch.int64, device=device).random_(-(2**63), None)
    lanes = numbers.view(torch.int16)[: rows * columns].view(rows, columns)
    return lanes >= dropped - 2**15, 1 - dropped / 2**16

"""The product of a gated MLP, act(gate) * up, as one step of autograd (SwiGLU and GeGLU: Shazeer 2020).

Kept for backward are gate and up; what the activation makes of the gate is computed again. Forward and backward are the
operations of torch's own autograd in their order, so every bit is that of the plain product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function, and its gradient: (gradient of the output, input) to that of the input."""

    apply: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, aten.silu_backward),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
    "gelu": Activation(F.gelu, aten.gelu_backward),
}


def reference_gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The same in plain torch."""
    return ACTIVATIONS[activation].apply(gate) * up


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up, all three (..., d) and of one type; gradients go to both."""
    y: Tensor = _Gated.apply(gate, up, ACTIVATIONS[activation])
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.apply(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        by_gate = ctx.activation.back(grad * up, gate) if ctx.needs_input_grad[0] else None
        by_up = ctx.activation.apply(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        return by_gate, by_up, None

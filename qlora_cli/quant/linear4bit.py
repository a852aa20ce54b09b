"""A 4-bit linear layer for the shapes that bitsandbytes' CPU kernel dequantises wrongly (see `roundtrip`)."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora_cli.quant.roundtrip import cpu_dequantize_is_wrong, dequantize_by_blocks


class _MatmulByBlocks(torch.autograd.Function):
    """x @ W.T + bias for a frozen 4-bit W, which is dequantised again in backward and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState) -> Tensor:
        """x: (..., in_features). packed: (numel / 2, 1) uint8. bias: (out_features,) in x's dtype, frozen."""
        ctx.save_for_backward(packed)  # through autograd, so that recomputation sees it; bitsandbytes saves it beside
        ctx.state = state
        return F.linear(x, dequantize_by_blocks(packed, state, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        return grad_output @ dequantize_by_blocks(packed, ctx.state, grad_output.dtype), None, None, None


class Linear4bitByBlocks(Linear4bit):
    """`bitsandbytes.nn.Linear4bit` with the same parameters and state dict, and a right product on CPU.

    It has no state of its own: an existing layer becomes one by `module.__class__ = Linear4bitByBlocks`. Unlike its
    parent it never repacks its weight in eval mode. The bias is frozen, as in every quantised base.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) floating. Returns (..., out_features) in x's dtype; computed in compute_dtype."""
        compute_dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.detach().to(compute_dtype)
        state = self.weight.quant_state
        return _MatmulByBlocks.apply(x.to(compute_dtype), self.weight.data, bias, state).to(x.dtype)


def work_round_cpu_dequantize(model: nn.Module) -> list[str]:
    """Swap the class of every 4-bit layer on the CPU that bitsandbytes would compute wrongly; return their names.

    To be called before the first forward. DoRA reads such weights through `bitsandbytes.functional.dequantize_4bit`
    itself and stays wrong: it has to be refused where this list is not empty.
    """
    swapped = []
    for name, module in model.named_modules():
        if type(module) is not Linear4bit or module.weight.device.type != "cpu":
            continue
        out_features, in_features = module.weight.quant_state.shape
        if cpu_dequantize_is_wrong(in_features, out_features, module.weight.quant_state.blocksize):
            module.__class__ = Linear4bitByBlocks
            swapped.append(name)
    return swapped


def reads_plainly(module: nn.Module) -> bool:
    """Whether PEFT, which dequantises a layer by itself for DoRA, reads its weight rightly.

    Not where bitsandbytes' own dequantisation is wrong, and not int8, whose scales leave the weight in its first pass.
    """
    return type(module) is Linear4bit

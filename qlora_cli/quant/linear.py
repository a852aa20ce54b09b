"""A linear layer whose weight is packed k-bit codes: frozen, dequantised for every product and never kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import Code, Packed, quantize
from qlora_cli.quant.codebooks import SCALE_BLOCK
from qlora_cli.quant.data_types import CODES
from qlora_cli.quant.scales import Scales

BUFFERS = ("scales", "scales_absmax", "scales_offset", "zeros")
"""What a packed weight has beside its codes; those that its storage does not need are None."""


@dataclass(frozen=True)
class Storage:
    """How a layer's weight is stored. data_type: a key of CODES; zero_point, clip: of uniform ones."""

    data_type: str
    block_size: int = 64
    double_quant: bool = True
    zero_point: bool = False
    clip: str = "auto"

    @property
    def code(self) -> Code:
        """Its code book and scale rule."""
        return CODES[self.data_type](self.zero_point, self.clip)


class PackedLinear(nn.Linear):
    """`nn.Linear` with a packed, frozen weight; a gradient flows to its input, and to an adapter around it.

    weight: (out · in · bits / 8,) uint8; scales (blocks,) fp32 or uint8 with scales_absmax and scales_offset fp32;
    zeros: packed uint8 or None. They keep their types when the module is cast.
    """

    transposed = False
    """Whether the checkpoint that it is read from has the weight as (in, out), as GPT-2's Conv1D."""
    scales: Tensor
    scales_absmax: Tensor | None
    scales_offset: Tensor | None
    zeros: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: Storage, **factory: Any) -> None:
        """factory: device, and dtype of the bias."""
        super().__init__(in_features, out_features, bias, device="meta")
        self.storage, self.code = storage, storage.code
        device, dtype = factory.get("device"), factory.get("dtype") or torch.get_default_dtype()
        tensors = empty(in_features * out_features, storage, device)
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for name in BUFFERS:
            self.register_buffer(name, tensors.get(name))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """Of the weight that is stored."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def packed(self) -> Packed:
        """The stored weight."""
        return Packed(self.weight.data, Scales(self.scales, self.scales_absmax, self.scales_offset), self.zeros)

    def packed_from(self, weight: Tensor) -> Packed:
        """A weight (out, in) as this layer stores it."""
        return quantize(weight, self.code, self.storage.block_size, self.storage.double_quant)

    def store(self, weight: Tensor) -> None:
        """Quantises a weight (out, in) and takes its place."""
        tensors = tensors_of(self.packed_from(weight))
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for name in BUFFERS:
            setattr(self, name, tensors[name])

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) that the layer multiplies with."""
        return kernels.dequantize(self.packed, self.code, self.storage.block_size, self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out) in the type that autocast multiplies in, else in x's own."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = _Product.apply(x, self.weight, bias, self.dequantized)
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves as every module does; scales stay fp32 where it is cast."""
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.storage}"


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


def empty(numel: int, storage: Storage, device: Any) -> dict[str, Tensor]:
    """The tensors of a packed weight of so many values, by name, without values."""
    blocks, bits = numel // storage.block_size, storage.code.bits
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((numel * bits // 8,), torch.uint8),
        "scales": ((blocks,), torch.uint8 if storage.double_quant else torch.float32),
    }
    if storage.double_quant:
        sizes["scales_absmax"] = (-(-blocks // SCALE_BLOCK),), torch.float32
        sizes["scales_offset"] = (), torch.float32
    if storage.zero_point:
        sizes["zeros"] = (-(-blocks * bits // 8),), torch.uint8
    return {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}


def tensors_of(packed: Packed) -> dict[str, Any]:
    """The tensors of a packed weight by the names that a layer gives them; None for those that there are not."""
    scales = packed.scales
    values = (packed.codes, scales.values, scales.absmax, scales.offset, packed.zeros)
    return dict(zip(("weight", *BUFFERS), values, strict=True))

"""What packed layers have in common: a frozen weight as codes and scales, in tensors that keep their types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

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


class PackedLayer(nn.Module):
    """A layer with a packed, frozen weight of two dimensions.

    weight: (numel · bits / 8,) uint8; scales (blocks,) fp32 or uint8 with scales_absmax and scales_offset fp32;
    zeros: packed uint8 or None. They keep their types when the module is cast.
    """

    storage: Storage
    code: Code
    weight: Tensor
    scales: Tensor
    scales_absmax: Tensor | None
    scales_offset: Tensor | None
    zeros: Tensor | None
    transposed = False
    """Whether the checkpoint that it is read from has the weight as (in, out), as GPT-2's Conv1D."""
    codes_dtype = torch.uint8
    """Of the codes. T5 casts what it feeds its `wo` to the type of that weight unless that is int8 (transformers 5)."""
    shared: tuple[PackedLayer, ...] = ()
    """The one layer whose weight and scales are this one's too; in a tuple, so that it is no submodule."""

    @property
    def shape(self) -> torch.Size:
        """Of the weight that is stored."""
        raise NotImplementedError

    @property
    def holder(self) -> PackedLayer:
        """The layer that has the tensors: itself, or the one that it is tied to."""
        return self.shared[0] if self.shared else self

    @property
    def packed(self) -> Packed:
        """The stored weight."""
        of = self.holder
        return Packed(of.weight.data.view(torch.uint8), Scales(of.scales, of.scales_absmax, of.scales_offset), of.zeros)

    def reserve(self, storage: Storage, device: Any) -> None:
        """Takes tensors without values for a weight of its shape."""
        self.storage, self.code = storage, storage.code
        tensors = empty(self.shape.numel(), storage, device)
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for name in BUFFERS:
            self.register_buffer(name, tensors.get(name))

    def hold_as_int8(self) -> None:
        """Has the same codes under the type that T5 leaves alone."""
        self.codes_dtype = torch.int8
        self.weight = nn.Parameter(self.weight.data.view(torch.int8), requires_grad=False)

    def tied_to(self, other: PackedLayer) -> Self:
        """Shares the weight of another layer, which is stored once, and keeps none of its own."""
        self.shared, self.storage, self.code, self.weight = (other,), other.storage, other.code, other.weight
        for name in BUFFERS:
            setattr(self, name, None)
        return self

    def packed_from(self, weight: Tensor) -> Packed:
        """A weight of its shape as this layer stores it."""
        return quantize(weight, self.code, self.storage.block_size, self.storage.double_quant)

    def store(self, packed: Packed) -> None:
        """Takes the place of a weight that `packed_from` or a like quantiser of the same code gave."""
        tensors = self.tensors_of(packed)
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for name in BUFFERS:
            setattr(self, name, tensors[name])

    def tensors_of(self, packed: Packed) -> dict[str, Any]:
        """The tensors of a packed weight by the names that this layer gives them; None for those that there are not."""
        return tensors_of(packed) | {"weight": packed.codes.view(self.codes_dtype)}

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the layer computes with."""
        return kernels.dequantize(self.packed, self.code, self.storage.block_size, self.shape, dtype)

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

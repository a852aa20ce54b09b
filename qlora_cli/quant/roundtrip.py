"""What a quantised layer multiplies with, computed from the checkpoint's weight, and a hash that proves it.

The order of roundings is the library's own, read in transformers 5.23 (`core_model_loading.py`, "3. Handle dtype
casting"; `integrations/bitsandbytes.py`) and bitsandbytes 0.50.2 (`nn/modules.py`, `functional.py`): the checkpoint's
tensor is cast to the `dtype` of `from_pretrained`, quantised from there (int8 goes through float16), and
dequantised to the dtype it was quantised from.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial, singledispatch

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn

from qlora_cli.quant.bitsandbytes import faster_quantiser


def _four_bit(data_type: str, weight: Tensor, double_quant: bool, block_size: int) -> Tensor:
    """`Params4bit`: packed nibbles (numel / 2, 1) uint8 with absmax per block in its `quant_state`."""
    parameter = Params4bit(
        weight, requires_grad=False, blocksize=block_size, compress_statistics=double_quant, quant_type=data_type
    )
    with faster_quantiser():
        return parameter.to(weight.device)


def _int8(weight: Tensor, double_quant: bool, block_size: int) -> Tensor:
    """`Int8Params` (out, in) int8 with one absmax per row in `SCB`. LLM.int8: arXiv 2208.07339, section 2."""
    return Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)


def _unquantized(weight: Tensor, double_quant: bool, block_size: int) -> Tensor:
    return weight


QUANTIZERS: dict[str, Callable[[Tensor, bool, int], Tensor]] = {
    "nf4": partial(_four_bit, "nf4"),
    "fp4": partial(_four_bit, "fp4"),
    "int8": _int8,
    "none": _unquantized,
}
"""Storage of a weight by its name in the recipe: (weight, double_quant, block_size) to what a live layer holds."""


def quantized(
    weight: Tensor, data_type: str, double_quant: bool, block_size: int, compute_dtype: torch.dtype
) -> Tensor:
    """The parameter that a layer loaded with `dtype=compute_dtype` holds.

    weight: (out_features, in_features), any floating dtype, on the device that quantises. It is not changed.
    Returns Params4bit (nf4, fp4), Int8Params (int8) or a plain tensor in compute_dtype (none).
    """
    rounded = weight.detach().to(compute_dtype, copy=True)  # a copy: the library's parameters keep what they are given
    return QUANTIZERS[data_type](rounded, double_quant, block_size)


@singledispatch
def values(weight: Tensor) -> Tensor:
    """The float32 values (out_features, in_features) of a plain, Params4bit or Int8Params weight."""
    return weight.detach().float()


@values.register(Params4bit)
def _(weight: Params4bit) -> Tensor:
    return dequantize_by_blocks(weight.data, weight.quant_state, weight.quant_state.dtype).float()


@values.register(Int8Params)
def _(weight: Int8Params) -> Tensor:
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def dequantized(
    weight: Tensor, data_type: str, double_quant: bool, block_size: int, compute_dtype: torch.dtype
) -> Tensor:
    """The float32 values that a layer loaded with `dtype=compute_dtype` multiplies with.

    weight: (out_features, in_features), as the layer stores it: a Conv1D weight is transposed first.
    nf4, fp4: rounded to compute_dtype, as the layer's matmul has them. int8: code * absmax / 127 unrounded; the layer
    also quantises its activations, and bitsandbytes' training path on CPU rounds this product to compute_dtype.
    """
    return values(quantized(weight, data_type, double_quant, block_size, compute_dtype))


def cpu_dequantize_is_wrong(in_features: int, out_features: int, block_size: int) -> bool:
    """Whether bitsandbytes' 4-bit dequantisation on AVX-512 CPUs is wrong for this shape, silently.

    Its vector path, taken when in_features is a multiple of 16, starts a new scale at every row. That is right only
    where rows are whole blocks, or where there is one row or one block in all. Measured with bitsandbytes 0.50.2.
    """
    rows_are_whole_blocks = in_features % block_size == 0
    one_scale_suffices = out_features == 1 or in_features * out_features <= block_size
    return in_features % 16 == 0 and not rows_are_whole_blocks and not one_scale_suffices


def dequantize_by_blocks(packed: Tensor, state: functional.QuantState, dtype: torch.dtype) -> Tensor:
    """`bitsandbytes.functional.dequantize_4bit`, right for every shape: rows are viewed as blocks, which is exact.

    packed: (numel / 2, 1) uint8 in the library's portable layout. Returns state.shape in dtype.
    """
    assert not getattr(state, "packing_format_for_cpu", False), "repacked for AVX-512 inference: disarm the layer first"
    numel = state.shape.numel()
    whole_blocks = numel % state.blocksize == 0
    by_blocks = copy.copy(state)
    by_blocks.dtype = dtype
    by_blocks.shape = torch.Size((numel // state.blocksize, state.blocksize) if whole_blocks else (numel,))
    return functional.dequantize_4bit(packed, by_blocks).reshape(state.shape)


@singledispatch
def _stored(weight: Tensor, row_absmax: Tensor | None) -> tuple[str, list[Tensor | None]]:
    """What identifies a weight's storage: a description and every tensor that enters its values."""
    return "plain", [weight]


@_stored.register(Params4bit)
def _(weight: Params4bit, row_absmax: Tensor | None) -> tuple[str, list[Tensor | None]]:
    state = weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "repacked for AVX-512 inference: disarm the layer first"
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    description = f"{state.quant_type} block {state.blocksize} shape {tuple(state.shape)} {state.dtype}"
    return description, [weight.data, state.absmax, state.code, *nested]


@_stored.register(Int8Params)
def _(weight: Int8Params, row_absmax: Tensor | None) -> tuple[str, list[Tensor | None]]:
    return "int8", [weight.data, weight.SCB if row_absmax is None else row_absmax]


def quantized_digest(weight: Tensor, row_absmax: Tensor | None = None) -> str:
    """SHA-256 (hex) over the packed bytes and the scales of a Params4bit, Int8Params or plain weight.

    Equal for a live module's weight and for `quantized(...)` of the checkpoint it was loaded from.
    row_absmax: the scales of an Int8Params whose layer took them over in its first forward (`state.SCB`).
    """
    description, tensors = _stored(weight, row_absmax)
    digest = hashlib.sha256(description.encode())
    for tensor in tensors:
        assert tensor is not None, "an int8 layer that has run holds its scales in state.SCB: use module_digest"
        digest.update(f"|{tensor.dtype} {tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_digest(module: nn.Module) -> str:
    """`quantized_digest` of a live linear layer's weight, before or after its first forward."""
    assert isinstance(module.weight, Tensor)
    state = getattr(module, "state", None)
    return quantized_digest(module.weight, getattr(state, "SCB", None))

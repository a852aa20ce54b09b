"""What a data type makes of a weight, stored and dequantised as a live layer does it: error, bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import NamedTuple, Self, TypeVar

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor

from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import quantize
from qlora_cli.quant.layers import is_packed, packed_config
from qlora_cli.quant.packed import Storage, tensors_of
from qlora_cli.quant.roundtrip import dequantize_by_blocks, quantized, values
from qlora_cli.recipe.schema import Quantization

T = TypeVar("T")

TURNS, BUDGET_S = 5, 0.1
"""A run is repeated at most so often, and until so much time is spent; the fastest counts."""


@dataclass(frozen=True)
class Figures:
    """Of one weight, or of several added up.

    num_bytes: codes, scales and zero points; not the code book, which is the same for all weights of a type.
    lost: ‖W − Q‖², energy: ‖W‖². quantize_s, dequantize_s: fastest run.
    """

    num_weights: int = 0
    num_bytes: int = 0
    lost: float = 0.0
    energy: float = 0.0
    quantize_s: float = 0.0
    dequantize_s: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    @property
    def error(self) -> float:
        """‖W − Q‖ / ‖W‖; 0 for zeros that stay zeros."""
        return float((self.lost / (self.energy or 1.0)) ** 0.5)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.num_bytes / self.num_weights


class Stored(NamedTuple):
    """A weight as a layer holds it: its tensors, and what gives the values (out, in) that the layer multiplies with."""

    tensors: list[Tensor]
    values: Callable[[], Tensor]


Quantizer = Callable[[Tensor], Stored]
"""A weight (out, in) of any floating type as the layer stores it."""


def quantizer(quantization: Quantization, name: str, compute_dtype: torch.dtype) -> Quantizer:
    """That of the layer `name` in a model loaded with `dtype=compute_dtype`: ours or bitsandbytes', as it is deployed.

    Its values are those of `layers.layer_values`, nf4 and the like in compute_dtype and int8 in float32.
    """
    storage = packed_config(quantization).storage_of(name) if is_packed(quantization) else None
    if storage is not None:
        return partial(_packed, storage, compute_dtype)
    return partial(_of_library, quantization, compute_dtype)


def measure(weight: Tensor, quantizer: Quantizer) -> Figures:
    """What the quantiser makes of a finite weight (out, in) fp32, on the weight's device."""
    stored, quantize_s = fastest(lambda: quantizer(weight), weight.device)
    found, dequantize_s = fastest(stored.values, weight.device)
    lost = (found.double() - weight).square_().sum().item()
    energy = weight.double().square_().sum().item()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors)
    return Figures(weight.numel(), num_bytes, lost, energy, quantize_s, dequantize_s)


def fastest(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What comes back, and the seconds of the fastest run, a device's work included."""
    spent: list[float] = []
    found: list[T] = []
    while len(spent) < TURNS and sum(spent) < BUDGET_S:
        found.clear()  # its memory is what the next run writes to
        _wait(device)
        started = time.perf_counter()
        found.append(run())
        _wait(device)
        spent.append(time.perf_counter() - started)
    return found[0], min(spent)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _packed(storage: Storage, compute_dtype: torch.dtype, weight: Tensor) -> Stored:
    """In blocks of our own."""
    code, block_size, shape = storage.code, storage.block_size, weight.shape
    packed = quantize(weight.to(compute_dtype), code, block_size, storage.double_quant)
    tensors = [tensor for tensor in tensors_of(packed).values() if tensor is not None]
    return Stored(tensors, lambda: kernels.dequantize(packed, code, block_size, shape, compute_dtype))


def _of_library(quantization: Quantization, compute_dtype: torch.dtype, weight: Tensor) -> Stored:
    """bitsandbytes' parameter, or the weight itself in compute_dtype."""
    how = (quantization.data_type, quantization.double_quant, quantization.block_size)
    parameter = quantized(weight, *how, compute_dtype)
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        nested = [state.offset, state.state2.absmax] if state.nested else []
        tensors = [parameter.data, state.absmax, *nested]
        return Stored(tensors, lambda: dequantize_by_blocks(parameter.data, state, compute_dtype))
    scales = [parameter.SCB] if isinstance(parameter, Int8Params) else []
    return Stored([parameter.data, *scales], lambda: values(parameter))

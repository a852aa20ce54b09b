"""PEFT's LoRA layers with the fused product of `kernels.lora_linear` in their forward pass.

A layer keeps its class's name, parameters and files: only its forward is another one, and only where PEFT would compute
a plain LoRA with one active adapter. All else (DoRA and other variants, several adapters, merged or switched-off ones,
layers of other libraries, int8) goes PEFT's own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_cli.kernels.lora_linear import FrozenWeight, lora_linear
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.linear4bit import Linear4bitByBlocks
from qlora_cli.quant.roundtrip import dequantize_by_blocks


def fuse_adapter(model: nn.Module) -> Any:
    """Gives every LoRA layer of a PEFT model that can have it the fused forward; returns the model."""
    kinds = _lora_kinds()
    for module in model.modules():
        kind: Any = type(module)
        if kind in kinds and type(module.base_layer) in READERS:
            module.__class__ = _fused(kind)
    return model


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Inside the block, in which no adapter may change, each of its fp32 weights is cast to the compute type once."""
    layers = [module for module in model.modules() if isinstance(module, Fused)]
    try:
        for layer in layers:
            layer.copies = {}
        yield
    finally:
        for layer in layers:
            layer.copies = None


def frozen_weight(layer: nn.Module) -> FrozenWeight:
    """The weight of a layer whose class is in READERS, or of one made from such a class.

    One that is kept dequantised (model/kept_weights.py) is what is read.
    """
    reader = next(READERS[kind] for kind in type(layer).__mro__ if kind in READERS)
    found, kept = reader(layer), vars(layer).get("kept_weight")
    if kept is None:
        return found
    return found._replace(read=lambda dtype: kept if dtype == kept.dtype else found.read(dtype))


def _plain(layer: Any) -> FrozenWeight:
    return FrozenWeight(layer.weight, layer.weight.to, layer.bias)


def _four_bit(layer: Any) -> FrozenWeight:
    read = partial(dequantize_by_blocks, layer.weight.data, layer.weight.quant_state)
    return FrozenWeight(layer.weight, read, layer.bias)


def _packed(layer: Any) -> FrozenWeight:
    return FrozenWeight(layer.weight, layer.dequantized, layer.bias)


FEW_ROWS = 32
"""Of an input, up to which bitsandbytes' own 4-bit product is taken where nothing is trained."""

READERS = {nn.Linear: _plain, Linear4bit: _four_bit, Linear4bitByBlocks: _four_bit, PackedLinear: _packed}
"""Classes of base layers, exactly, to what reads their weight."""


class Fused(nn.Module):
    """Stands before a class of PEFT and replaces its forward; it has no parameters of its own."""

    copies: dict[tuple[int, torch.dtype], Tensor] | None = None
    """Adapter weights as they are multiplied, within `cast_once`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) to (..., out): in the type that autocast multiplies in, else in x's."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        layer: Any = self
        name = None if args or kwargs else plain_adapter(layer)
        if name is None or not fits(layer, name, dtype, autocast) or is_generating(layer.base_layer, x):
            unfused: Tensor = super().forward(x, *args, **kwargs)
            return unfused
        a, b = (self.copied(weights[name].weight, dtype) for weights in (layer.lora_A, layer.lora_B))
        dropout = layer.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        y = lora_linear(x.to(dtype), frozen_weight(layer.base_layer), a, b, layer.scaling[name], p)
        return y.to(x.dtype) if isinstance(layer.base_layer, Linear4bit) else y

    def copied(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """An adapter's weight in `dtype`, its gradient in its own."""
        if self.copies is None or weight.dtype == dtype or not torch.is_grad_enabled():
            return weight.to(dtype)
        key = (id(weight), dtype)
        if key not in self.copies:
            self.copies[key] = weight.to(dtype)
        return self.copies[key]


def plain_adapter(layer: Any) -> str | None:
    """The name of a layer's one active adapter, where it is a plain LoRA that is neither merged nor switched off."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    is_plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
    return name if is_plain else None


def fits(layer: Any, name: str, dtype: torch.dtype, autocast: bool) -> bool:
    """Whether PEFT would multiply in `dtype` too, by a weight that nobody trains, in modules that nobody watches."""
    base, a = layer.base_layer, layer.lora_A[name]
    is_trained = any(parameter.requires_grad for parameter in base.parameters())
    if is_trained or any(map(is_watched, (base, a, layer.lora_B[name], layer.lora_dropout[name]))):
        return False
    return (autocast or a.weight.dtype == dtype) and getattr(base, "compute_dtype", None) in (None, dtype)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, which its own call alone would run."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def is_generating(base: Any, x: Tensor) -> bool:
    """Whether bitsandbytes has a kernel for so few rows that dequantises nothing: on a GPU, without gradients."""
    few = x.shape[:-1].numel() <= FEW_ROWS
    return isinstance(base, Linear4bit) and x.is_cuda and few and not torch.is_grad_enabled()


def _lora_kinds() -> tuple[type, ...]:
    """PEFT's classes whose forward is known: of ordinary and of 4-bit layers."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    return Linear, PeftLinear4bit


@cache
def _fused(kind: type) -> type:
    return type(kind.__name__, (Fused, kind), {"__module__": kind.__module__})

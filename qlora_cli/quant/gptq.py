"""Layers of GPTQ and AWQ checkpoints, as the gptqmodel package makes them, with a product of ours that trains.

The package's own kernels are made for generation: on a CPU its first pass in eval mode packs the weight anew in place,
after which no gradient goes through the layer, and where one does, the dequantised weights of every layer stay in
memory until backward (7.6.0).
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.quant.linear import frozen_product

BACKENDS = {"gptq": "gptq_torch", "awq": "torch_awq"}
"""The package's plain kernel by quant_method: it leaves the tensors as they are loaded."""


def choose_kernel(config: Any) -> Any:
    """The configuration of a GPTQ or AWQ checkpoint with the plain kernel named in it; its log is kept off stdout.

    Raises UserError where the package does not import.
    """
    try:
        with redirect_stdout(io.StringIO()):
            from logbar import LogBar

            LogBar.shared().setLevel(logging.ERROR)
            import gptqmodel  # noqa: F401 (says what it is and sees)
    except ImportError as error:
        what, todo = f"cannot be imported: {error}", "run `pip install 'qlora[gptq]'`"
        raise UserError("gptqmodel", what, todo, Exit.ENVIRONMENT) from error
    stored = dict(config.quantization_config)
    config.quantization_config = stored | {"backend": BACKENDS[stored["quant_method"]]}
    return config


def package_layers() -> tuple[type, ...]:
    """The class of the package's layers; none where no such checkpoint has been loaded."""
    loaded = sys.modules.get("gptqmodel.nn_modules.qlinear")
    return (loaded.BaseQuantLinear,) if loaded else ()


def make_trainable(model: nn.Module) -> list[str]:
    """Gives the package's layers a product that dequantises again in backward; returns their names.

    To be called before the first forward.
    """
    layers = _layers(model)
    for layer in layers.values():
        kind: Any = type(layer)
        layer.__class__ = _trainable(kind)
    return list(layers)


def package_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of what the package's layers store: their method's name for the codes, scales for the rest."""
    for layer in _layers(model).values():
        yield str(layer.SUPPORTS_METHODS[0].value), layer.qweight
        yield from (("scales", tensor) for name, tensor in layer.named_buffers() if name not in ("qweight", "bias"))


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, package_layers())}


class _Trainable(nn.Module):
    """Stands before a class of the package and replaces its forward; it has no state of its own."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the layer multiplies with; the package computes it in float16."""
        return _weight_of(self)(self).T.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out); the checkpoint's bias is added in x's type."""
        bias: Any = self.bias
        qweight: Any = self.qweight
        return frozen_product(x, qweight, bias, self.dequantized)


@cache
def _trainable(kind: type) -> type:
    return type(f"Trainable{kind.__name__}", (_Trainable, kind), {})


def _weight_of(module: nn.Module) -> Callable[[Any], Tensor]:
    """What reads a layer's weight (in, out), without the kernel's caches and compilation."""
    from gptqmodel.nn_modules.qlinear import AWQuantLinear, PackableQuantLinear

    return _awq_weight if isinstance(module, AWQuantLinear) else PackableQuantLinear.dequantize_weight


def _awq_weight(module: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight: Tensor = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
    return weight

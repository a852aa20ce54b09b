"""Frozen weights that stay dequantised, where memory allows: a step then dequantises none of them, twice a layer.

Under `training.memory: fast`. What is kept is what would have been read, so that no bit of a result changes. It is no
part of the model: not of its state, its files or its fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora_cli.model.fused import Fused, frozen_weight


class Kept(NamedTuple):
    """How many of the layers that could be kept are, and what they take."""

    number: int
    of: int
    num_bytes: int

    @property
    def words(self) -> str:
        """As in `all 56 weights kept dequantised`."""
        which = f"all {self.of}" if self.number == self.of else f"{self.number} of {self.of}"
        return f"{which} weights kept dequantised"


def keep_weights(model: nn.Module, dtype: torch.dtype, most_bytes: int | None = None) -> Kept:
    """Dequantises weights under an adapter into `dtype`, from the first layer on, as long as they fit.

    most_bytes: together; None: all. Those that are stored in `dtype` are not counted. Called again it starts anew.
    """
    drop_weights(model)
    number, of, taken = 0, 0, 0
    for layer in _quantised(model, dtype):
        of += 1
        num_bytes = layer.in_features * layer.out_features * dtype.itemsize
        if most_bytes is None or taken + num_bytes <= most_bytes:
            layer.kept_weight = frozen_weight(layer).read(dtype).detach()
            number, taken = number + 1, taken + num_bytes
    return Kept(number, of, taken)


def drop_weights(model: nn.Module) -> bool:
    """Gives back what was kept; whether anything was."""
    kept = [module for module in model.modules() if "kept_weight" in vars(module)]
    for module in kept:
        del module.kept_weight
    return bool(kept)


def all_weights_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What all of them would take."""
    return sum(layer.in_features * layer.out_features * dtype.itemsize for layer in _quantised(model, dtype))


def _quantised(model: nn.Module, dtype: torch.dtype) -> Iterator[Any]:
    """The base layers under fused adapters that are stored as something else than `dtype`."""
    for module in model.modules():
        layer: Any = getattr(module, "base_layer", None) if isinstance(module, Fused) else None
        if layer is not None and layer.weight.dtype != dtype:
            yield layer

"""An adapter that starts at what quantisation lost, layer by layer: LoftQ, and PiSSA and OLoRA on a quantised base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.model import calibration, weights
from qlora_cli.model.base import Base, load_model
from qlora_cli.quant import kernels
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.loftq import Alternation, Measure, Quantizer, Start, loftq, olora, pissa
from qlora_cli.recipe.schema import Adapter, Quantization, Recipe

STARTS: dict[str, Callable[[Tensor, Quantizer[Any], int, float, Alternation], Start[Any]]] = {
    "loftq": loftq,
    "pissa": lambda weight, quantizer, rank, scaling, _alternation: pissa(weight, quantizer, rank, scaling),
    "olora": lambda weight, quantizer, rank, scaling, _alternation: olora(weight, quantizer, rank, scaling),
}
"""Starts that change the base, by adapter.init."""


@dataclass(frozen=True)
class Line:
    """A module's line of the table.

    before, after: ‖W - Q‖ / ‖W‖ of plain quantisation and ‖W - (Q + scaling · B A)‖ / ‖W‖; with calibration of the
    layer's outputs. iteration: LoftQ's best, 0 for plain quantisation.
    """

    module: str
    rank: int
    before: float
    after: float
    iteration: int


def changes_base(adapter: Adapter) -> bool:
    """Whether the adapter's start goes with a base of its own."""
    return adapter.init in STARTS


def start_layers(recipe: Recipe, base: Base, model: Any, rows: Sequence[Sequence[int]]) -> Iterator[Line]:
    """Gives every adapted layer of `model` its start, one weight at a time, and then yields its line of the table.

    base: packed; its weights are changed. rows: token ids of the calibration rows, if any.
    """
    layers = adapted_layers(model)
    weight_of = weights.of_checkpoint(base.folder, base.model)
    for name, measure in measures(recipe, base, [*layers], rows):
        yield start_layer(recipe.adapter, name, layers[name], weight_of(name), (base.compute_dtype, measure))


def adapted_layers(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers by the full names of the modules that they wrap."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def measures(
    recipe: Recipe, base: Base, names: Sequence[str], rows: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Measure]]:
    """The norm of each module's errors: with calibration rows that of its outputs, as the unquantised base feeds it."""
    if not rows:
        yield from ((name, Measure()) for name in names)
        return
    unquantized = recipe.model_copy(update={"quantization": Quantization(data_type="none")})
    model, _head = load_model(unquantized, base, base.compute_dtype, base.device)
    for portion in calibration.portions(model, names):
        moments = calibration.second_moments(model, portion, rows)
        for name in portion:
            yield name, Measure(calibration.square_root(moments[name], name) if name in moments else None)


def start_layer(adapter: Adapter, name: str, layer: Any, weight: Tensor, how: tuple[torch.dtype, Measure]) -> Line:
    """Changes the weight and the adapter of one PEFT layer, where its start does. weight: (out, in) fp32.

    The rank is at most the weight's own; what is beyond keeps the default start, which adds nothing.
    """
    dtype, measure = how
    a, b = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
    weight = weight.to(a.device)
    rank = min(layer.r["default"], *weight.shape)
    stored = codec(layer.base_layer, dtype)
    alternation = Alternation(adapter.loftq.iterations, adapter.loftq.order, measure)
    start = STARTS[adapter.init](weight, stored.quantizer, rank, layer.scaling["default"], alternation)
    stored.store(start.stored)
    if start.A is not None and start.B is not None:
        with torch.no_grad():
            a[:rank], b[:, :rank] = start.A, start.B
    return Line(name, rank, start.plain, start.error, start.iteration)


@dataclass(frozen=True)
class Codec:
    """How a live layer keeps a weight: what it would store of one, and taking that for its own."""

    quantizer: Quantizer[Any]
    store: Callable[[Any], None]


def codec(layer: nn.Module, dtype: torch.dtype) -> Codec:
    """That of a packed layer, or of one that is not quantised. dtype: what the layer multiplies in."""
    if isinstance(layer, PackedLinear):

        def quantizer(weight: Tensor) -> tuple[Any, Tensor]:
            packed = layer.packed_from(weight)
            values = kernels.dequantize(packed, layer.code, layer.storage.block_size, layer.shape, dtype)
            return packed, values.float()

        return Codec(quantizer, layer.store)

    def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.to(dtype), weight.to(dtype).float()

    def store(values: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        layer.weight.data = (values.T if weights.is_transposed(layer) else values).contiguous()

    return Codec(rounded, store)

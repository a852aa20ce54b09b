"""Frozen linear layers whose weights lie in host memory, and come to the device layer by layer as they are read.

A linear asks for its layer whenever it reads its weight, in forward and in backward: a checkpointed layer's backward
may begin before the layer is computed again (bitsandbytes keeps nothing that would make autograd do so first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import UserError
from qlora_cli.kernels.layer_stream import LayerStream, needed_bytes
from qlora_cli.model.fused import READERS, FrozenWeight, frozen_weight
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.quant.linear import frozen_product
from qlora_cli.quant.packed import BUFFERS


class Streamed(nn.Module):
    """Stands before a class of frozen linear layers; it has no parameters of its own.

    on_host: tensors that stay in host memory, by the id of the tensor or parameter that stands for them on the device.
    """

    stream: LayerStream
    index: int
    on_host: dict[int, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), as the layer's own class computes it."""
        found, dtype = frozen_weight(self), getattr(self, "compute_dtype", None)
        if dtype is None:
            return frozen_product(x, found.stored, found.bias, found.read)
        bias = None if found.bias is None else found.bias.detach()
        return frozen_product(x.to(dtype), found.stored, bias, found.read).to(x.dtype)

    def __deepcopy__(self, memo: Any) -> Any:
        """PEFT trains copies of what modules_to_save names."""
        what = "names a layer that `training.memory: lean` streams from host memory"
        raise UserError("adapter.modules_to_save", what, "use training.memory: offload")


def stream_layers(model: nn.Module, device: torch.device, spared: Sequence[str] = ()) -> LayerStream:
    """Leaves the linear weights of every layer in host memory, and gives their modules places on `device`.

    Of a model that is in host memory. spared: ends of the names of modules that are left as they are. Raises UserError
    for a model that has no layers known to transformers, or whose linear layers are of other kinds.
    """
    groups = [linears for linears in _by_layer(model, spared) if linears]
    if not groups:
        what = "no layer of this model can be streamed from host memory: transformers knows none, or none is linear"
        raise UserError("training.memory", f"`lean`, and {what}", "use offload")
    stream = LayerStream(device, max(needed_bytes(_tensors(linears)) for linears in groups))
    for index, linears in enumerate(groups):
        places = iter(stream.add(_tensors(linears)))
        for linear in linears:
            kind: Any = type(linear)
            linear.__class__ = _streamed(kind)
            linear.stream, linear.index, linear.on_host = stream, index, {}
            for owner, name in [*_hooks(linear)]:
                place = next(places)
                setattr(owner, name, place.on_device)
                linear.on_host[id(owner if owner is linear.weight else place.on_device)] = place.on_host
    return stream


def _tensors(linears: list[Any]) -> list[Tensor]:
    return [getattr(owner, name) for linear in linears for owner, name in _hooks(linear)]


def _by_layer(model: nn.Module, spared: Sequence[str]) -> Iterator[list[Any]]:
    """The linear layers of each layer, every one once."""
    ends = tuple(f".{name}" for name in spared)  # as PEFT reads modules_to_save
    seen = {id(module) for name, module in model.named_modules() if f".{name}".endswith(ends)}
    for layer in checkpointing_layers(model):
        found = [module for module in layer.modules() if type(module) in READERS and not getattr(module, "shared", ())]
        yield [module for module in found if id(module) not in seen]
        seen.update(map(id, found))


def _hooks(linear: Any) -> Iterator[tuple[Any, str]]:
    """Where the large tensors of a linear layer hang: codes and scales, or a weight as it is."""
    yield linear.weight, "data"
    state = getattr(linear.weight, "quant_state", None)
    while state is not None:
        yield state, "absmax"
        state = state.state2
    for name in BUFFERS:
        if getattr(linear, name, None) is not None:
            yield linear, name


def _read(own: Callable[[Any], FrozenWeight], layer: Any) -> FrozenWeight:
    """As the layer's own class reads its weight, with its layer asked for first.

    Autograd is shown the tensor on the host, which never changes; those on the device change with every layer.
    """
    found = own(layer)

    def read(dtype: torch.dtype) -> Tensor:
        layer.stream.ask(layer.index)
        return found.read(dtype)

    return FrozenWeight(layer.on_host[id(layer.weight)], read, found.bias)


@cache
def _streamed(kind: type) -> type:
    swapped = type(kind.__name__, (Streamed, kind), {"__module__": kind.__module__})
    own = READERS[kind]
    READERS[swapped] = lambda layer: _read(own, layer)
    return swapped

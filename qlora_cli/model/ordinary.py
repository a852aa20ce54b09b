"""A checkpoint as ordinary weights, also where it is stored packed: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.layout import meta_model
from qlora_cli.model.ordinary_bitsandbytes import bitsandbytes_weights
from qlora_cli.model.ordinary_gptq import awq_weights, gptq_weights
from qlora_cli.model.prequantized import method_of, refuse_unknown_form
from qlora_cli.model.safetensors_stream import Checkpoint, Entry, read_checkpoint, read_tensor
from qlora_cli.model.source import read_config
from qlora_cli.model.stored_weight import StoredWeight, Tensors
from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import Packed
from qlora_cli.quant.data_types import QUANT_METHOD
from qlora_cli.quant.packed import PackedLayer, empty
from qlora_cli.quant.scales import Scales


@dataclass(frozen=True)
class Ordinary:
    """A checkpoint of ordinary weights. read: the tensor of a name in a file of it."""

    checkpoint: Checkpoint
    read: Callable[[Path, str], Tensor]


def ordinary(folder: Path, dtype: torch.dtype) -> Ordinary:
    """The checkpoint in a folder; packed weights come dequantised to dtype, as the live layers have them.

    They are in the orientation of an ordinary checkpoint. Raises UserError where the folder has no such checkpoint, or
    one whose packed weights lack a part.
    """
    checkpoint, config = read_checkpoint(folder), read_config(folder)
    refuse_unknown_form(config, folder)
    method = method_of(config)
    if method is None:
        return Ordinary(checkpoint, read_tensor)
    weights = FORMS[method](Tensors(checkpoint))
    packed = {weight.name: weight for weight in weights}
    instead = {weight.parts[0]: Entry(weight.name, dtype, weight.shape) for weight in weights}
    hidden = {part for weight in weights for part in weight.parts[1:]}
    shards = {
        shard: [instead.get(entry.name, entry) for entry in entries if entry.name not in hidden]
        for shard, entries in checkpoint.shards.items()
    }

    def read(path: Path, name: str) -> Tensor:
        return packed[name].values(dtype) if name in packed else read_tensor(path, name)

    return Ordinary(Checkpoint(folder, {shard: entries for shard, entries in shards.items() if entries}), read)


def packed_weights(stored: Tensors) -> list[StoredWeight]:
    """The weights that our own layers have packed; they are checked as they are read."""
    found = []
    for module, layer in packed_layers(stored.folder).items():
        if (name := f"{module}.weight") in stored.entries:
            needed = (f"{module}.{part}" for part in empty(layer.shape.numel(), layer.storage, "meta"))
            parts = tuple(part for part in needed if part in stored.entries)
            shape = tuple(layer.shape[::-1] if layer.transposed else layer.shape)
            found.append(StoredWeight(name, shape, parts, partial(_dequantized, stored, name, layer)))
    return found


def packed_layers(folder: Path) -> dict[str, PackedLayer]:
    """The packed layers of the model in a folder, without values, by their names."""
    from qlora_cli.quant.plugin import PackedConfig, PackedQuantizer

    model = meta_model(folder)
    config = PackedConfig(**read_config(folder)["quantization_config"])
    PackedQuantizer(config, pre_quantized=True).preprocess_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def _dequantized(stored: Tensors, name: str, layer: PackedLayer, dtype: torch.dtype) -> Tensor:
    """The values of a packed weight. Raises UserError where a tensor is missing, or not as the layer stores it."""
    parts = {}
    for part, wanted in empty(layer.shape.numel(), layer.storage, "meta").items():
        one = f"{name.removesuffix('weight')}{part}"
        if one not in stored.entries:
            raise UserError(stored.file(name), f"{one} is missing: {layer.storage} needs it", "restore the folder")
        parts[part] = stored.read(one)
        if part == "weight" and parts[part].dtype == layer.codes_dtype:
            parts[part] = parts[part].view(torch.uint8)
        found, needed = ((tuple(tensor.shape), tensor.dtype) for tensor in (parts[part], wanted))
        if found != needed:
            raise UserError(stored.file(one), f"{one} is {found}, {layer.storage} needs {needed}", "restore the folder")
    scales = Scales(parts["scales"], parts.get("scales_absmax"), parts.get("scales_offset"))
    packed = Packed(parts["weight"], scales, parts.get("zeros"))
    values = kernels.dequantize(packed, layer.code, layer.storage.block_size, layer.shape, dtype)
    return values.T if layer.transposed else values


FORMS: dict[str, Callable[[Tensors], list[StoredWeight]]] = {
    QUANT_METHOD: packed_weights,
    "bitsandbytes": bitsandbytes_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
}
"""How a checkpoint tells of its packed weights, by quantization_config.quant_method."""

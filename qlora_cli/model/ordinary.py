"""A checkpoint as ordinary weights, also where it is stored packed: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.layout import meta_model
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.safetensors_stream import Checkpoint, Entry, read_checkpoint, read_tensor
from qlora_cli.model.source import read_config
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

    They are in the orientation of an ordinary checkpoint. Raises UserError where the folder has no such checkpoint.
    """
    stored = read_checkpoint(folder)
    if method_of(read_config(folder)) != QUANT_METHOD:
        return Ordinary(stored, read_tensor)
    layers = packed_layers(folder)
    shards = {shard: _ordinary_entries(entries, layers, dtype) for shard, entries in stored.shards.items()}
    files = {entry.name: folder / shard for shard, entries in stored.shards.items() for entry in entries}

    def read(path: Path, name: str) -> Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        return read_tensor(path, name) if layer is None else _dequantized(files, name, layer, dtype)

    return Ordinary(Checkpoint(folder, shards), read)


def packed_layers(folder: Path) -> dict[str, PackedLayer]:
    """The packed layers of the model in a folder, without values, by their names."""
    from qlora_cli.quant.plugin import PackedConfig, PackedQuantizer

    model = meta_model(folder)
    config = PackedConfig(**read_config(folder)["quantization_config"])
    PackedQuantizer(config, pre_quantized=True).preprocess_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def _ordinary_entries(entries: list[Entry], layers: dict[str, Any], dtype: torch.dtype) -> list[Entry]:
    """What the file would hold if its weights were not packed."""
    found = []
    for entry in entries:
        module, _, part = entry.name.rpartition(".")
        layer = layers.get(module)
        if layer is None or part == "bias":
            found.append(entry)
        elif part == "weight":
            found.append(Entry(entry.name, dtype, tuple(layer.shape[::-1] if layer.transposed else layer.shape)))
    return found


def _dequantized(files: dict[str, Path], name: str, layer: PackedLayer, dtype: torch.dtype) -> Tensor:
    """The values of a packed weight, whose scales may lie in another file than its codes.

    files: by tensor. Raises UserError where a tensor is missing, or not as the layer stores it.
    """
    parts = {}
    for part, wanted in empty(layer.shape.numel(), layer.storage, "meta").items():
        one = f"{name.removesuffix('weight')}{part}"
        if one not in files:
            raise UserError(files[name], f"{one} is missing: {layer.storage} needs it", "restore the folder")
        parts[part] = read_tensor(files[one], one)
        if part == "weight" and parts[part].dtype == layer.codes_dtype:
            parts[part] = parts[part].view(torch.uint8)
        found, needed = ((tuple(tensor.shape), tensor.dtype) for tensor in (parts[part], wanted))
        if found != needed:
            raise UserError(files[one], f"{one} is {found}, {layer.storage} needs {needed}", "restore the folder")
    scales = Scales(parts["scales"], parts.get("scales_absmax"), parts.get("scales_offset"))
    packed = Packed(parts["weight"], scales, parts.get("zeros"))
    values = kernels.dequantize(packed, layer.code, layer.storage.block_size, layer.shape, dtype)
    return values.T if layer.transposed else values

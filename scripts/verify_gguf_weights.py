"""A GGUF file's weights in a transformers model: what llama.cpp computes with, whatever rounding made of it.

The way back from llama.cpp's layout is written here anew, so that it does not inherit a mistake of the way there.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, quants
from torch import Tensor

from qlora_cli.export.gguf_architectures import architecture_of, load_config
from qlora_cli.export.gguf_tensors import heads_of, name_map

COMPUTED = {"rope_freqs.weight"}
"""Tensors of a file that transformers computes from the config."""


def with_weights_of(path: Path, folder: Path, model: Any) -> Any:
    """A copy of the model of `folder` with the dequantised weights of the file, in float32."""
    arch, config = architecture_of(folder), load_config(folder)
    to_name = name_map(arch, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    made = copy.deepcopy(model)
    used = set()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            theirs = to_name(name)
            assert theirs in stored, f"{path} has no tensor for {name}"
            value = torch.from_numpy(quants.dequantize(stored[theirs].data, stored[theirs].tensor_type).copy())
            value = value.reshape(parameter.shape)
            if arch.permuted and (heads := heads_of(theirs, config)):
                value = halves_first(value, heads)
            if arch.norm_shift and theirs.endswith("_norm.weight"):
                value = value - arch.norm_shift
            parameter.copy_(value)
            used.add(theirs)
    assert set(stored) - used <= COMPUTED, f"{path} has more tensors: {sorted(set(stored) - used)}"
    return made


def halves_first(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from pairs to transformers' order, in each head: even rows, then odd ones."""
    by_head = rows.reshape(heads, rows.shape[0] // heads, *rows.shape[1:])
    return torch.cat([by_head[:, 0::2], by_head[:, 1::2]], dim=1).reshape(rows.shape)

"""Which tensor of a transformers folder becomes which tensor of a GGUF file, and in which type."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.export.gguf_architectures import WHOLE, Architecture, head_dim, kv_heads, rope_factors
from qlora_cli.export.gguf_file import Planned
from qlora_cli.model.safetensors_stream import Checkpoint, Entry, read_tensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Type

SKIPPED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Buffers of old checkpoints that are computed anew."""

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


def name_map(arch: Architecture, num_layers: int) -> Callable[[str], str | None]:
    """llama.cpp's name of a transformers tensor; None where it has none."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(kind, num_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from transformers' order (first halves, second halves) to pairs, in each head.

    rows (heads * head_dim, ...). The same permutation serves weights, biases and the B of a LoRA.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def heads_of(name: str, config: Any) -> int | None:
    """How many heads the rows of a tensor belong to, for q and k; None for any other."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return kv_heads(config) if ".attn_k." in name else None


def plan_tensors(checkpoint: Checkpoint, arch: Architecture, config: Any, file_type: str) -> list[Planned]:
    """The tensors of the file, in its order. Raises UserError for one that llama.cpp has no place for, or misses."""
    to_name = name_map(arch, config.num_hidden_layers)
    tied = arch.head_is_embedding or config.tie_word_embeddings
    planned: list[Planned] = []
    for shard, entries in checkpoint.shards.items():
        for entry in entries:
            if entry.name.endswith(SKIPPED) or (tied and entry.name == "lm_head.weight"):
                continue
            name = to_name(entry.name)
            if name is None or not _has_place(name, arch):
                what = f"llama.cpp's {arch.name} has no place for tensor {entry.name}"
                raise UserError(checkpoint.folder, what, WHOLE)
            load = partial(_load, checkpoint.folder / shard, entry, name, arch, config)
            planned.append(Planned(name, entry.shape, type_of(name, entry.shape, file_type, tied), load))
    if factors := rope_factors(config):
        made = torch.tensor(factors, dtype=torch.float32)
        planned.insert(0, Planned("rope_freqs.weight", tuple(made.shape), type_of("", (1,), "f32", tied), made.clone))
    _check_complete(checkpoint.folder, planned, config, tied)
    return sorted(planned, key=lambda tensor: _order(tensor.name))


def type_of(name: str, shape: tuple[int, ...], file_type: str, tied: bool) -> Type:
    """The type of a tensor in a file of a type, by the rules of llama.cpp's converter and llama-quantize.

    Vectors stay in F32. A row that is no multiple of 32 cannot be cut into blocks: F16. In a q4_0 file the output
    layer, or the embedding that serves as one, is Q8_0: llama-quantize takes Q6_K, which the gguf package cannot write.
    """
    from gguf import GGMLQuantizationType as Type

    if len(shape) < 2 or name.endswith("_norm.weight"):
        return Type.F32
    kind = Type[file_type.upper()]
    if kind in (Type.Q8_0, Type.Q4_0) and shape[-1] % 32:
        return Type.F16
    is_output = name == (EMBEDDING if tied else OUTPUT)
    return Type.Q8_0 if kind is Type.Q4_0 and is_output else kind


def _has_place(name: str, arch: Architecture) -> bool:
    """Whether the graph reads it: a bias only where the table has one."""
    part = re.sub(r"^blk\.\d+\.", "", name)
    return not part.endswith(".bias") or part.removesuffix(".bias") in arch.biases


def _load(path: Path, entry: Entry, name: str, arch: Architecture, config: Any) -> Tensor:
    """The tensor as llama.cpp wants it."""
    tensor = read_tensor(path, entry.name)
    heads = heads_of(name, config)
    if arch.permuted and heads:
        return interleaved(tensor, heads)
    if arch.norm_shift and name.endswith("_norm.weight"):
        return tensor.float() + arch.norm_shift
    return tensor


def _order(name: str) -> tuple[int, int, str]:
    """The embedding first, then the blocks, then the head, as llama.cpp's converter writes them."""
    block = re.match(r"blk\.(\d+)\.", name)
    first = 1 if block else 2 if name.startswith("output") else 0
    return first, int(block[1]) if block else 0, name


def _check_complete(folder: Path, planned: list[Planned], config: Any, tied: bool) -> None:
    """Raises UserError where a block lacks what another has, or embedding, norm or head are missing or misshapen."""
    shapes = {tensor.name: tensor.shape for tensor in planned}
    parts: dict[int, set[str]] = defaultdict(set)
    for name in shapes:
        if block := re.match(r"blk\.(\d+)\.(.+)", name):
            parts[int(block[1])].add(block[2])
    every = set().union(*parts.values()) | {"attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"}
    wanted = [f"blk.{index}.{part}" for index in range(config.num_hidden_layers) for part in sorted(every)]
    wanted += [EMBEDDING, "output_norm.weight", *([] if tied else [OUTPUT])]
    if absent := [name for name in wanted if name not in shapes]:
        raise UserError(folder, f"it has no tensor for llama.cpp's {absent[0]}", "complete the folder")
    sizes = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        "blk.0.attn_q.weight": (config.num_attention_heads * head_dim(config), config.hidden_size),
        "blk.0.attn_k.weight": (kv_heads(config) * head_dim(config), config.hidden_size),
    }
    for name, size in sizes.items():
        if shapes[name] != size:
            what = f"the tensor for {name} is {shapes[name]}, config.json asks for {size}"
            raise UserError(folder, what, "mend config.json")

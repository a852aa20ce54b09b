"""Single weights of a checkpoint by their names in the live model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import UserError
from qlora_cli.model.names import key_mapping
from qlora_cli.model.safetensors_stream import read_checkpoint, read_tensor

Weights = Callable[[str], Tensor]
"""The full name of a linear module to its weight (out, in), unquantised, fp32."""


def of_checkpoint(folder: Path, model: Any) -> Weights:
    """The weights of the checkpoint that `model` was loaded from, read one at a time."""
    checkpoint = read_checkpoint(folder)
    prefixes = [pattern.strip("^\\.") for pattern in key_mapping(model)]
    files = {entry.name: folder / shard for shard, entries in checkpoint.shards.items() for entry in entries}

    def weight(module: str) -> Tensor:
        bare = module.removeprefix(f"{model.base_model_prefix}.")
        names = (module, bare, *(f"{published}.{bare}" for published in prefixes))  # `bare`: hub GPT-2
        name = next((f"{name}.weight" for name in names if f"{name}.weight" in files), None)
        if name is None:
            what = f"no tensor for {module}: transformers makes it of others, which is not available yet"
            raise UserError(folder, what, "leave the module out of adapter.target_modules")
        stored = read_tensor(files[name], name).float()
        if not stored.isfinite().all():
            raise UserError(f"{files[name]}: {name}", "holds NaN or infinity", "restore the checkpoint")
        return stored.T if is_transposed(model.get_submodule(module)) else stored

    return weight


def is_transposed(module: nn.Module) -> bool:
    """Whether the checkpoint has the module's weight as (in, out)."""
    module = getattr(module, "base_layer", module)  # below an adapter
    return isinstance(module, Conv1D) or getattr(module, "transposed", False)

"""Weights of a checkpoint that lie packed in several tensors: what a form of storage tells of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.layout import meta_model
from qlora_cli.model.names import renamer
from qlora_cli.model.safetensors_stream import Checkpoint, Entry, read_tensor


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of an ordinary checkpoint that is made of others.

    parts: their names; the first is the one in whose place it stands. values: reads them; `shape` in a dtype.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    values: Callable[[torch.dtype], Tensor]


class Tensors:
    """The tensors of a checkpoint by their names, in whatever file."""

    def __init__(self, checkpoint: Checkpoint):
        self.folder = checkpoint.folder
        self.entries = checkpoint.entries()
        self._files = {entry.name: shard for shard, entries in checkpoint.shards.items() for entry in entries}

    def file(self, name: str) -> Path:
        """Where a tensor is."""
        return self.folder / self._files[name]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return read_tensor(self.file(name), name)

    def entry(self, name: str, beside: str) -> Entry:
        """What the header says of a tensor. Raises UserError where it is missing; beside: one that needs it."""
        if name not in self.entries:
            raise UserError(self.file(beside), f"{name} is missing: {beside} needs it", "restore the folder")
        return self.entries[name]

    def require(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], beside: str) -> None:
        """Refuses a checkpoint without this tensor, or with another in its place."""
        entry = self.entry(name, beside)
        if entry.shape != shape or entry.dtype not in dtypes:
            what = f"{name} is {entry.shape} {entry.dtype}, needed is {shape} {' or '.join(map(str, dtypes))}"
            raise UserError(self.file(name), what, "restore the folder")


def stored_transposed(folder: Path) -> Callable[[str], bool]:
    """Whether an ordinary checkpoint of the folder's model has a weight as (in_features, out_features), by its name."""
    from transformers.pytorch_utils import Conv1D

    model = meta_model(folder)
    live = renamer(model)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return lambda name: live(name) in conv1d

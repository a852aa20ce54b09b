"""The head of a merged model: tensors that the base lacks and the adapter has, and what config.json says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.merge.adapter_delta import PREFIX, Adapter
from qlora_cli.model.heads import TASK_KEYS, TASKS
from qlora_cli.model.layout import Layout, Made
from qlora_cli.model.ordinary import Ordinary
from qlora_cli.model.safetensors_stream import Checkpoint, Entry


def for_task(source: Ordinary, adapter: Adapter, layout: Layout, made: Made | None) -> Ordinary:
    """The base's checkpoint as one of the task's class: with the head that only the adapter has, in its last file.

    Tensors have their names in the live model, and what the class has no place for, such as the head of a language
    model, is left out. Raises UserError where neither base nor adapter has a weight of the class.
    """
    if made is None or not TASKS[made.task].has_head:
        return source
    names = {full: name for name in source.checkpoint.entries() if (full := layout.live(name)) is not None}
    kept = {
        shard: [replace(entry, name=full) for entry in entries if (full := layout.live(entry.name)) is not None]
        for shard, entries in source.checkpoint.shards.items()
    }
    shards = {shard: entries for shard, entries in kept.items() if entries}
    there = names.keys()
    tied = {f"{module}.weight" for module in layout.tied}
    absent = layout.parameters.keys() - there - (tied if tied & there else set())
    if lost := sorted(name for name in absent if PREFIX + name not in adapter.shapes):
        raise UserError(
            adapter.folder,
            f"{len(lost)} weights of {layout.architecture} are neither in the base nor in the adapter: {lost[0]}",
            "name the base and the task that the adapter was trained with",
        )
    new = [Entry(name, torch.float32, layout.parameters[name]) for name in sorted(absent)]
    last = max(shards)
    shards[last] = [*shards[last], *new]

    def read(path: Path, name: str) -> Tensor:
        return adapter.tensor(PREFIX + name) if name in absent else source.read(path, names[name])

    return replace(source, checkpoint=Checkpoint(source.checkpoint.folder, shards), read=read)


def keys_of(made: Made | None, layout: Layout) -> dict[str, Any]:
    """What the task decides in config.json: the architecture, and of a head its labels and the padding it reads by."""
    if made is None:
        return {}
    stored = made.config.to_dict()
    wanted = TASK_KEYS if TASKS[made.task].has_head else ()
    return {"architectures": [layout.architecture]} | {
        key: stored[key] for key in wanted if stored.get(key) is not None
    }
